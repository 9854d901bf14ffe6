"""An incomplete or unfit checkpoint is refused by `push`, with the reason, before anything is sent.

The tests are offline, so that any request would be another error: huggingface_hub's `OfflineModeIsEnabled`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_stompp import push
from hf_stompp.checkpoint import load_complete, whole_folder

REPO = "user/tiny-1bit"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def without_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def without_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_shards_swapped(folder: Path) -> None:
    sharded(folder)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    first.write_bytes(second.read_bytes())


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


BROKEN: dict[str, tuple[type[Exception], str, Callable[[Path], Any]]] = {
    "no folder": (FileNotFoundError, "no folder", shutil.rmtree),
    "no config": (FileNotFoundError, "has no config.json", lambda f: (f / "config.json").unlink()),
    "half a config": (ValueError, "config.json is truncated", lambda f: (f / "config.json").write_text('{"a":')),
    "full precision": (ValueError, "is not binarized", lambda f: edit_config(f, quantization_config=None)),
    "another method": (
        ValueError,
        "is not binarized",
        lambda f: edit_config(f, quantization_config={"quant_method": "hqq"}),
    ),
    "no class": (ValueError, "names no class in `architectures`", lambda f: edit_config(f, architectures=None)),
    "no weights": (FileNotFoundError, "has no model.safetensors:", lambda f: (f / "model.safetensors").unlink()),
    "truncated": (ValueError, "model.safetensors is truncated or corrupted", truncate),
    "no shard": (
        FileNotFoundError,
        r"no model-00002-of-\d+.safetensors, which model.safetensors.index",
        without_shard,
    ),
    "another shard": (ValueError, r"model-00001-of-\d+.safetensors has no tensor \S+, which", with_shards_swapped),
    "two models": (
        ValueError,
        "has both model.safetensors and model.safetensors.index.json",
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
    ),
    "no packed layer": (
        ValueError,
        r"no tensor bert.encoder.layer.0.attention.self.key.weight",
        lambda f: without_tensor(f, "bert.encoder.layer.0.attention.self.key.weight"),
    ),
    "no scale": (
        ValueError,
        r"no tensor bert.encoder.layer.0.attention.self.key.weight_scale",
        lambda f: without_tensor(f, "bert.encoder.layer.0.attention.self.key.weight_scale"),
    ),
    "no head": (ValueError, "has no tensor classifier.weight", lambda f: without_tensor(f, "classifier.weight")),
}


@pytest.mark.parametrize(("error", "message", "damage"), BROKEN.values(), ids=BROKEN)
def test_an_incomplete_folder(
    error: type[Exception], message: str, damage: Callable[[Path], Any], packed_folder: Path
) -> None:
    damage(packed_folder)
    with pytest.raises(error, match=message):
        push(packed_folder, REPO)


def test_what_is_no_packed_model(
    frozen_bert: PreTrainedModel, tiny_model: Callable[..., PreTrainedModel], packed_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="This BertForSequenceClassification is a latent checkpoint"):
        push(frozen_bert, REPO)
    for latent_too in (False, True):
        with pytest.raises(ValueError, match="This BertForSequenceClassification is not binarized"):
            push(tiny_model("bert"), REPO, latent=latent_too)
    frozen_bert.save_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match="latent is a latent checkpoint: .*pass latent=True"):
        push(tmp_path / "latent", REPO)
    with pytest.raises(TypeError, match="tokenizer with a model"):
        push(packed_folder, REPO, tokenizer=object())


def test_what_is_complete(packed_folder: Path, frozen_bert: PreTrainedModel, tmp_path: Path) -> None:
    """The same checks take what is sound, sharded or not."""
    whole = load_complete(packed_folder).state_dict()
    sharded(packed_folder)
    parts = load_complete(packed_folder).state_dict()
    assert whole.keys() == parts.keys() and all(whole[key].equal(parts[key]) for key in whole)
    frozen_bert.save_pretrained(tmp_path / "latent")
    assert load_complete(tmp_path / "latent", latent=True).config.quantization_config.mode == "train"
    with pytest.raises(ConnectionError, match="offline mode is enabled"):  # nothing but the network is in the way
        push(packed_folder, REPO)


def test_a_whole_folder_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    for text in ("one", "two"):
        with whole_folder(tmp_path / "model") as draft:
            (draft / "config.json").write_text(text)
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "model" / "config.json").read_text() == "two"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_file_is_not_made_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="model is a file"), whole_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
