"""The examples do what they say."""

import importlib
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
