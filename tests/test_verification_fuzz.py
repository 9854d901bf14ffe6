"""No corruption of a packed model passes `verify`: bytes of the header, tensors, fields of the config, one by one."""

import copy
import dataclasses
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from verified import failure, freeze

from hf_stompp import BinarizationConfig, model_card, pack, verify
from hf_stompp.verification import Verification

LIMIT = 20  # seconds of one verification: more is a hang


FIXED = ("quant_method", "mode", "weights", "activations", "embedding_bits", "modules", "format_version")
# Without a card, these may be changed to another value of the same kind: it is another model, or the same one trained
# in another way, as sound as this one. With a card no change passes, whatever it is.
FREE = {
    "add_cross_attention", "attention_probs_dropout_prob", "bos_token_id", "classifier_dropout", "eos_token_id",
    "hidden_act", "hidden_dropout_prob", "initializer_range", "is_decoder", "layer_norm_eps", "num_attention_heads",
    "pad_token_id", "tie_word_embeddings", "transformers_version", "use_cache",
    *(f"quantization_config.{field.name}" for field in dataclasses.fields(BinarizationConfig)),
} - {f"quantization_config.{name}" for name in FIXED}  # fmt: skip


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    def late(*args: Any) -> None:
        raise BaseException(f"{what}: more than {LIMIT} seconds")  # what verify does not catch

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable) -> Path:
    """The folder of a packed model as small as can be, with 8-bit embeddings and no card."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = tiny_model("bert", vocab_size=20, max_position_embeddings=8, **sizes)
    folder = tmp_path_factory.mktemp("sound")
    pack(freeze(model), embedding_bits=8).save_pretrained(folder)
    assert verify(folder, scores=False).ok
    return folder


def verified(folder: Path, what: str) -> Verification:
    with time_limit(what):
        return verify(folder, scores=False)


def replaced_bytes(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Each byte of the header replaced: all bits but one the same, or a digit, a quote, a random byte."""
    rng = random.Random(0)
    length = 8 + int.from_bytes(content[:8], "little")
    for i in range(length):
        values = [content[i] ^ 1, ord("0"), ord('"'), content[i] ^ 0x20, rng.randrange(256)]
        for value in values if i < 16 or i % 16 == 0 else [values[i % 5]]:
            if value != content[i]:
                yield f"byte {i} is {value}", content[:i] + bytes([value]) + content[i + 1 :]


def test_each_byte_of_the_header(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, folder := tmp_path / "model")
    file = folder / "model.safetensors"
    count = 0
    for what, content in replaced_bytes(file.read_bytes()):
        file.write_bytes(content)
        assert failure(verified(folder, what)), what
        count += 1
    assert count > 4000


def test_truncation_and_missing_tensors(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, folder := tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    rng = random.Random(1)
    for length in [0, 1, 7, 8, 9, len(content) - 1, *rng.sample(range(len(content)), 60)]:
        file.write_bytes(content[:length])
        assert failure(verified(folder, f"{length} bytes"))
    file.write_bytes(content + b"\0")
    assert failure(verified(folder, "a byte more"))
    tensors = load(content)
    for name in tensors:
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        changes = {"is absent": others, "is of another type": {**tensors, name: tensors[name].to(torch.float64)}}
        changes["has a row more"] = {**tensors, name: torch.cat([tensors[name], tensors[name][:1]])}
        changes["has a twin"] = {**tensors, f"{name}_2": tensors[name].clone()}
        for what, changed in changes.items():
            file.write_bytes(save(changed, metadata={"format": "pt"}))
            assert failure(verified(folder, f"{name} {what}")), (name, what)


def paths_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields of nested objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths_of(inner, (*path, key))


def other_values(value: Any) -> Iterator[Any]:
    """Values of other kinds, impossible sizes, and others of the same kind."""
    yield from (None, "other", -1, 0, 10**9, 10**18, 1e9, [], ["other"], {}, {"a": 1}, True, False)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from (value + 1, 2 * value, -value, 0.5)
    yield from {"gelu": ["relu"], "signed": ["unsigned"], "unsigned": ["signed"]}.get(str(value), [])


def changed_configs(config: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Dotted path of the field, the new value ("absent" if it is removed), the config."""
    for path in paths_of(config):
        *outer, last = path
        values = [
            value for value in other_values(_at(config, path)) if json.dumps(value) != json.dumps(_at(config, path))
        ]
        for value in ["absent", *values]:
            changed = copy.deepcopy(config)
            if value == "absent":
                del _at(changed, outer)[last]
            else:
                _at(changed, outer)[last] = value
            yield ".".join(path), value, changed
    changed = copy.deepcopy(config)
    changed["quantization_config"]["modules"]["new"] = {"unit": 0, "levels": None}
    yield "modules.new", {"unit": 0, "levels": None}, changed


def _at(config: Any, path: Any) -> Any:
    for key in path:
        config = config[key]
    return config


def test_each_field_of_the_config(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, folder := tmp_path / "model")
    shutil.copytree(sound, carded := tmp_path / "carded")
    model_card(carded).save(carded / "README.md")
    assert verify(carded, scores=False).ok
    count, passed = 0, set()
    for path, value, config in changed_configs(json.loads((sound / "config.json").read_text())):
        for where in (folder, carded):
            (where / "config.json").write_text(json.dumps(config))
        assert failure(verified(carded, f"{path} {value!r}")), (path, value)
        done = verified(folder, f"{path} {value!r}")
        assert done.ok or failure(done)
        if done.ok:
            assert value != "absent", path
            passed.add(path)
        count += 1
    assert count > 900
    # A unit says in which order a model is trained that is unpacked again.
    assert {path for path in passed if not path.endswith(".unit")} <= FREE


def test_each_value_with_a_card(sound: Path, tmp_path: Path) -> None:
    """Other bits are another model: only the card can tell."""
    shutil.copytree(sound, folder := tmp_path / "model")
    model_card(folder).save(folder / "README.md")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for i in random.Random(2).sample(range(start, len(content)), 100):
        file.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        assert failure(verified(folder, f"byte {i}"))
