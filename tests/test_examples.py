"""The examples do what they say."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def client(packed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of examples/serve.py, which serves the tiny packed model."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="examples/serve.py needs fastapi and uvicorn, which are not installed")
    from fastapi.testclient import TestClient

    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "serve", raising=False)
    threads = torch.get_num_threads()
    yield TestClient(importlib.import_module("serve").create_app(str(packed_folder)))
    torch.set_num_threads(threads)


def test_the_server_answers_as_the_pipeline_does(client: Any, packed_folder: Path) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    text = "this is an example ."
    [expected] = pipeline("text-classification", model=str(packed_folder))(text)
    answer = client.post("/predict", json={"text": text})
    assert answer.status_code == 200
    assert answer.json() == {"label": expected["label"], "score": pytest.approx(expected["score"])}


def test_the_server_refuses_what_is_no_text(client: Any) -> None:
    for body in ({}, {"text": None}, {"text": ["this", "is"]}, {"text": " "}, {"text": "a" * 20_001}, "this"):
        assert client.post("/predict", json=body).status_code == 422, body


def test_a_refusal_does_not_repeat_the_text(client: Any) -> None:
    long = client.post("/predict", json={"text": "a" * 1_000_000})
    assert long.status_code == 422 and len(long.content) < 1000 and "20000" in long.text
    torn = client.post("/predict", content=b'{"text": "\\ud800"}', headers={"content-type": "application/json"})
    assert torn.status_code == 422 and "text" in torn.text


def test_the_server_wants_a_tokenizer(client: Any, packed_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(packed_folder / name, tmp_path / name)
    with pytest.raises(SystemExit, match="has no tokenizer of its own"):
        sys.modules["serve"].create_app(str(tmp_path))
