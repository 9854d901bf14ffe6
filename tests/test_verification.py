"""`verify` takes what is sound, says what of it agrees with the card, and lets no corruption of the files pass."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from verified import failure, freeze

from hf_stompp import model_card, pack, verify
from hf_stompp.verification import Verification


def statuses(done: Verification) -> dict[str, str]:
    return {check.name: check.status for check in done.checks}


# --- what is sound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("binarization", "packing"),
    [
        ({}, {}),
        ({"activations": False}, {}),
        ({"replace_gelu": True, "pooler": True}, {"embedding_bits": 8}),
        ({"include": ["classifier"]}, {"embedding_bits": 1, "dtype": torch.float16}),
    ],
    ids=["W1A1", "W1A32", "8-bit tables", "1-bit tables, half precision"],
)
def test_kinds_of_models(
    binarization: dict[str, Any], packing: dict[str, Any], tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    pack(freeze(model, **binarization), **packing).save_pretrained(tmp_path)
    done = verify(tmp_path)
    assert done.ok and [name for name, status in statuses(done).items() if status == "skipped"] == [
        "checksums",
        "card",
        "scores",
    ]
    model_card(tmp_path).save(tmp_path / "README.md")
    done = verify(tmp_path)
    assert done.ok and set(statuses(done).values()) == {"passed", "skipped"} and statuses(done)["card"] == "passed"


def test_architectures(architecture: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    pack(freeze(tiny_model(architecture)), embedding_bits=8).save_pretrained(tmp_path)
    done = verify(tmp_path)
    assert done.ok and statuses(done)["resave"] == "passed", done


def test_what_it_prints(packed_folder: Path) -> None:
    lines = str(verify(packed_folder, scores=False)).splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["files", "passed"],
        ["checksums", "skipped"],
        ["config", "passed"],
        ["model", "passed"],
        ["resave", "passed"],
        ["card", "skipped"],
        ["scores", "skipped"],
    ]
    assert lines[-1] == f"{packed_folder}: ok"


@pytest.fixture
def sharded(packed_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    AutoModelForSequenceClassification.from_pretrained(packed_folder).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_shards(sharded: Path) -> None:
    assert verify(sharded, scores=False).ok
    index = sharded / "model.safetensors.index.json"
    content = index.read_text()
    name = "bert.encoder.layer.0.attention.self.key.weight"
    for change, message in {
        (lambda c: c["weight_map"].pop(name)): f"has a tensor {name} that model.safetensors.index.json does not list",
        (lambda c: c["weight_map"].update({"new": c["weight_map"][name]})): "has no tensor new, which",
        (lambda c: c["weight_map"].update({name: "model-00009-of-00009.safetensors"})): "has no model-00009-of-00009",
        (lambda c: c["metadata"].update(total_size=1)): "says total_size 1, but the tensors have",
        (lambda c: c.clear()): "has no model.safetensors",
    }.items():
        changed = json.loads(content)
        change(changed)
        index.write_text(json.dumps(changed))
        assert message in failure(verify(sharded, scores=False))
    index.write_text(content)
    shutil.copy(next(sharded.glob("model-00001*")), sharded / "model-00001-of-00009.safetensors")
    assert "has model-00001-of-00009.safetensors, which is of another model" in failure(verify(sharded, scores=False))


# --- what is not a packed model --------------------------------------------------------------------------------------


def test_other_models_fail(
    frozen_bert: PreTrainedModel, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    assert "files:" in failure(verify(tmp_path)) and "has no config.json" in failure(verify(tmp_path))
    frozen_bert.save_pretrained(tmp_path / "latent")
    assert "is a latent checkpoint" in failure(verify(tmp_path / "latent"))
    tiny_model("bert").save_pretrained(tmp_path / "float")
    assert "is not binarized" in failure(verify(tmp_path / "float"))


def test_wrong_arguments_raise(packed_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a repository"):
        verify(tmp_path / "absent")
    with pytest.raises(ConnectionError, match="'user/absent' is not a folder, and could not be downloaded"):
        verify("user/absent")  # the tests are offline
    with pytest.raises(ValueError, match="revision: received 'main', but .* is a folder"):
        verify(packed_folder, revision="main")
    with pytest.raises(ValueError, match="tolerance: received -1; allowed: a finite number, 0 or above"):
        verify(packed_folder, tolerance=-1)
    with pytest.raises(FileNotFoundError, match="dataset_dir: received .*absent'; allowed: a folder"):
        verify(packed_folder, dataset_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"unit": 0},
        {"unit": True, "levels": "signed"},
        {"unit": 0.0, "levels": "signed"},
        {"unit": "0", "levels": "signed"},
        {"unit": -1, "levels": "signed"},
        {"unit": 0, "levels": "both"},
        {"unit": 0, "levels": "signed", "shape": 8},
        {"unit": 0, "levels": "signed", "shape": [8.0]},
        {"bits": True},
        {"bits": 2},
    ],
    ids=str,
)
def test_an_entry_of_modules_that_is_none_is_refused(entry: Any, packed_folder: Path) -> None:
    content = json.loads((packed_folder / "config.json").read_text())
    key = next(iter(content["quantization_config"]["modules"]))
    content["quantization_config"]["modules"][key] = entry
    (packed_folder / "config.json").write_text(json.dumps(content))
    message = f"quantization_config.modules[{key!r}] in config.json is {entry!r}; allowed: unit, a number, with"
    assert f"config: {message}" in failure(verify(packed_folder))
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoModelForSequenceClassification.from_pretrained(packed_folder)


# --- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"(Weights:\*\*) [\d,]+", r"\1 1,024", "card: README.md states weights 1024, but the model has"),
        (r"they are [\d,]+,", "they are 5,000,", "card: README.md states float_weights 5000, but"),
        (r"W1A1", "W1A32", "card: README.md states bits W1A32, but the model has W1A1"),
        (r"\| total \|", "| sum |", "card: README.md states parts"),
        (r'"mask_seed": 0', '"mask_seed": 1', "card: README.md states config"),
        (r"\A---\n", "---\na: b: c\n", "card: "),
        (r"[0-9a-f]{64}(?=  config)", "0" * 64, "checksums: .*states the SHA-256 0* of config.json"),
        (r"(?<=  )tokenizer.json", "vocab.txt", "checksums: .*states a checksum of vocab.txt, which is not there"),
    ],
)
def test_a_card_of_something_else(pattern: str, replacement: str, message: str, packed_folder: Path) -> None:
    text = str(model_card(packed_folder))
    changed, count = re.subn(pattern, replacement, text, count=1)
    assert count
    (packed_folder / "README.md").write_text(changed)
    assert re.match(message, failure(verify(packed_folder)))


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("evil/m.py", "its metric 'evil/m.py' is not one of accuracy, f1, glue,"),
        ("evil/m", "its metric 'evil/m' is not one of"),
        ("loss", "its metric 'loss' is not one of"),
        ("accuracy", "'accuracy' is a file or folder here, which would be taken for its metric; pass metric"),
    ],
)
def test_no_code_that_a_card_names_is_run(
    metric: str, reason: str, packed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for script in ("evil/m.py", "m.py", "accuracy/accuracy.py", "loss/loss.py"):
        Path(script).parent.mkdir(exist_ok=True)
        Path(script).write_text("open('ran', 'w').close()\n")
    (tmp_path / "data").mkdir()
    write_results(packed_folder, "{columns: [sentence]}", metric)
    check = verify(packed_folder, dataset_dir=tmp_path / "data").checks[-1]
    assert check.status == "skipped" and reason in check.message
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("arguments", "config", "problem", "reason"),
    [
        ("sst2", "sst2", None, "the card does not say which columns the model reads"),
        ("{columns: [sentence]}", "../outside", None, "its metric's config '../outside' is not a name; pass metric"),
        ("{columns: [sentence]}", "sst2", "multi_label_classification", "the model gives several labels to a text"),
    ],
    ids=["a Trainer's card", "config", "multi-label"],
)
def test_scores_that_cannot_be_checked(
    arguments: str, config: str, problem: str | None, reason: str, packed_folder: Path
) -> None:
    write_results(packed_folder, arguments, "accuracy", config)
    content = json.loads((packed_folder / "config.json").read_text())
    if problem is not None:
        (packed_folder / "config.json").write_text(json.dumps(content | {"problem_type": problem}))
    done = verify(packed_folder)
    assert done.ok, done
    assert done.checks[-1].status == "skipped" and reason in done.checks[-1].message


def write_results(folder: Path, arguments: str, metric: str, config: str = "sst2") -> None:
    """A card of one structured result."""
    (folder / "README.md").write_text(
        "---\nmodel-index:\n- name: m\n  results:\n  - task: {type: text-classification}\n"
        f"    dataset: {{name: d, type: user/data, config: {config}, split: validation, args: {arguments}}}\n"
        f"    metrics:\n    - {{type: {metric}, value: 0.5}}\n---\n# m\n"
    )


def test_a_card_by_hand(packed_folder: Path) -> None:
    (packed_folder / "README.md").write_text("# My model\n")
    done = verify(packed_folder)
    assert done.ok and statuses(done)["checksums"] == "skipped"
    assert "no figures; 0 evaluation results" in str(done)
