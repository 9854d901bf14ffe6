"""The page that documents the format: its reader, run in a process that has neither torch nor this package."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from hf_stompp import BinarizationConfig, binarize, calibrate, pack
from hf_stompp.patching import binary_layers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "format.md"
RUN = """
import sys
floats = read({folder!r})
assert not {{"torch", "transformers", "hf_stompp"}} & set(sys.modules), "read without them"
np.savez({output!r}, **floats)
"""


def read_with_the_page(folder: Path, output: Path) -> dict[str, np.ndarray]:
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 60
    script = code + RUN.format(folder=str(folder), output=str(output))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=output.parent)
    return dict(np.load(output))


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 1])
def test_the_reader_on_the_page_decodes_the_trained_weights(
    bits: int, activations: bool, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    latent = binarize(tiny_model("bert"), BinarizationConfig(activations=activations, embedding_bits=bits))
    if activations:
        calibrate(latent, tiny_batch())
    for layer in binary_layers(latent).values():
        layer.set_frozen(1.0, step=1)
    packed = pack(latent)
    packed.save_pretrained(tmp_path / "packed", max_shard_size="8KB")
    floats = read_with_the_page(tmp_path / "packed", tmp_path / "floats.npz")
    for name, layer in binary_layers(latent).items():
        w = layer.weight.detach().double().numpy()
        expected = np.abs(w).mean(axis=1, keepdims=True) * np.where(w >= 0, 1.0, -1.0)
        np.testing.assert_allclose(floats[f"{name}.weight"], expected, rtol=1e-6)
    for name in ("word", "position", "token_type"):
        table = packed.get_submodule(f"bert.embeddings.{name}_embeddings")
        rows = table(torch.arange(table.num_embeddings)).detach().numpy()
        np.testing.assert_allclose(floats[f"bert.embeddings.{name}_embeddings.weight"], rows, rtol=1e-6)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.LayerNorm.bias"):
        assert np.array_equal(floats[name], packed.get_parameter(name).detach().numpy())


@pytest.fixture
def tiny_resnet() -> ResNetForImageClassification:
    """Latent, fully frozen; its kernels have a number of weights that is no multiple of eight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic")
        latent = binarize(ResNetForImageClassification(config).eval(), BinarizationConfig())
        calibrate(latent, {"pixel_values": torch.randn(2, 3, 40, 40)})
    for layer in binary_layers(latent).values():
        layer.set_frozen(1.0, step=1)
        layer.register_parameter("bias", torch.nn.Parameter(torch.ones(layer.out_channels)))
    return latent


def test_the_reader_on_the_page_decodes_the_kernels_of_convolutions(
    tiny_resnet: ResNetForImageClassification, tmp_path: Path
) -> None:
    pack(tiny_resnet, fold_batch_norm=False).save_pretrained(tmp_path / "packed")
    floats = read_with_the_page(tmp_path / "packed", tmp_path / "floats.npz")
    for name, layer in binary_layers(tiny_resnet).items():
        w = layer.weight.detach().double().numpy()
        expected = np.abs(w).mean(axis=(1, 2, 3), keepdims=True) * np.where(w >= 0, 1.0, -1.0)
        np.testing.assert_allclose(floats[f"{name}.weight"], expected, rtol=1e-6)


def test_the_tables_on_the_page_are_the_tensors_of_the_file(
    tiny_model: Callable, tiny_batch: Callable, tiny_resnet: ResNetForImageClassification, tmp_path: Path
) -> None:
    latent = binarize(tiny_model("bert"), BinarizationConfig(embedding_bits=4, attention=True))
    calibrate(latent, tiny_batch())
    for layer in binary_layers(latent).values():
        layer.set_frozen(1.0, step=1)
    pack(latent).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    pack(tiny_resnet).save_pretrained(tmp_path / "resnet")
    tensors |= load_file(tmp_path / "resnet" / "model.safetensors")
    linear, others = PAGE.read_text(encoding="utf-8").split("## Tensors")[1].split("A **convolution**")
    convolution, others = others.split("An **embedding table**")
    table, attention = others.split("The **tensors that attention multiplies**")
    for text, module in (
        (linear, "bert.encoder.layer.0.output.dense"),
        (convolution, "resnet.encoder.stages.1.layers.0.layer.0.convolution"),
        (table, "bert.embeddings.word_embeddings"),
        (attention.split("## Bits")[0], "bert.encoder.layer.0.attention.self.binary_attention.queries"),
    ):
        rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
        documented = {row[1].strip(" `"): row[2].strip() for row in rows}
        found = {name.removeprefix(module + "."): t for name, t in tensors.items() if name.startswith(module + ".")}
        assert documented.keys() == found.keys()
        dtypes = {"U8": np.uint8, "F32": np.float32, "a float": np.float32}
        assert {name: dtypes[dtype] for name, dtype in documented.items()} == {n: t.dtype for n, t in found.items()}
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 1
