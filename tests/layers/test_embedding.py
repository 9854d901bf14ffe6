"""The latent and the packed table against numpy, and what the packed one costs in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stompp import BinarizationConfig
from hf_stompp.layers import BinaryEmbedding, PackedEmbedding

BITS = [1, 4, 8, 16]


def table(rows: int = 50, size: int = 21) -> nn.Embedding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Embedding(rows, size, padding_idx=3)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_decoded_from_the_bytes(bits: int) -> None:
    packed = PackedEmbedding.from_float(table(), bits)
    ids = torch.tensor([[0, 49, 7], [3, 3, 12]])
    expected = np.empty((2, 3, 21))
    for place, token in np.ndenumerate(ids.numpy()):
        number = int.from_bytes(packed.weight[token].numpy().tobytes(), "little")
        codes = [number >> bits * k & (1 << bits) - 1 for k in range(21)]
        expected[place] = packed.weight_scale[token].item() * (2 * np.array(codes) - 2**bits + 1)
    np.testing.assert_allclose(packed(ids).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(packed.to_float()(ids).detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.65), (4, 0.12), (8, 0.008), (16, 3e-5)])
def test_more_bits_are_closer(bits: int, error: float) -> None:
    weight = table(200, 64).weight.detach()
    packed = PackedEmbedding.from_float(table(200, 64), bits)
    rows = packed(torch.arange(200))
    rows[3], weight[3] = 0, 0
    assert (rows - weight).norm() / weight.norm() < error


@pytest.mark.parametrize("bits", BITS)
def test_the_padding_row_stays_zero(bits: int) -> None:
    assert not PackedEmbedding.from_float(table(), bits)(torch.tensor([3])).any()


class Largest(TorchDispatchMode):
    """The most bytes that one tensor had which an operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("bits", BITS)
def test_the_table_is_never_unpacked(bits: int) -> None:
    packed = PackedEmbedding.from_float(table(5000, 64), bits)
    with Largest() as largest:
        packed(torch.tensor([[1, 4999]]))
    assert largest.bytes <= 2 * 64 * 16  # two rows, in int64 at most


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_lose_no_more_than_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    embedding = table(200, 64)
    embedding.weight.data.mul_(1e-3)  # scales are below what float16 resolves
    rows = PackedEmbedding.from_float(embedding, 16).to(dtype)(torch.arange(200))
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, embedding.weight.detach().to(dtype), rtol=2**-7, atol=1e-7)


def test_tokens_outside_of_the_table_are_refused() -> None:
    packed = PackedEmbedding.from_float(table(), 8)
    for token in (-1, 50):
        with pytest.raises(IndexError):
            packed(torch.tensor([token]))


@pytest.mark.parametrize("bits", BITS)
def test_the_output_has_the_dtype_of_the_model(bits: int) -> None:
    packed = PackedEmbedding.from_float(table(), bits).to(torch.bfloat16)
    assert packed.weight.dtype == torch.uint8 and packed(torch.tensor([1])).dtype == torch.bfloat16
    assert f"weight_bits={bits}" in repr(packed)


# --- the latent table ------------------------------------------------------------------------------------------------


def latent(fraction: float, rows: int = 50, size: int = 21, **config: Any) -> BinaryEmbedding:
    layer = BinaryEmbedding.from_float(table(rows, size), BinarizationConfig(**config), key="words", unit=0)
    layer.set_frozen(fraction, step=3)
    return layer


def numpy_rows(layer: BinaryEmbedding, clip: float) -> np.ndarray:
    """What every row should be, in float64."""
    w = layer.weight.detach().double().numpy()
    scale = np.abs(w).mean(axis=1, keepdims=True)
    hard = np.where(w >= 0, scale, -scale)
    return np.where(layer.weight_mask.numpy(), hard, np.clip(w, -clip * scale, clip * scale))


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_looked_up_rows_are_soft_or_binary_by_the_mask(fraction: float) -> None:
    layer, ids = latent(fraction, clip=1.5), torch.tensor([[0, 49, 7], [3, 3, 12]])
    assert layer.weight_mask.float().mean().item() == pytest.approx(fraction, abs=0.05)
    expected = numpy_rows(layer, clip=1.5)[ids.numpy()]
    np.testing.assert_allclose(layer(ids).detach().numpy(), expected, rtol=1e-6)
    assert not layer(torch.tensor([3])).any(), "the padding row is zeros"


def test_without_clip_and_nothing_frozen_it_is_the_table_itself() -> None:
    layer, ids = latent(0.0, clip=None), torch.arange(50)
    assert torch.equal(layer(ids), table()(ids))


@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_gradients_of_the_looked_up_rows(surrogate: str) -> None:
    layer = latent(0.4, clip=1.5, surrogate=surrogate)
    ids = torch.tensor([[0, 49, 7], [3, 7, 12]])
    factors = torch.randn(2, 3, 21, generator=torch.Generator().manual_seed(1))
    (layer(ids) * factors).sum().backward()
    w, mask = layer.weight.detach().double().numpy(), layer.weight_mask.numpy()
    expected = np.zeros_like(w)
    for place, token in np.ndenumerate(ids.numpy()):
        inside = np.abs(w[token]) <= 1.5 * np.abs(w[token]).mean()
        passes = inside if surrogate == "ste" else inside & ~mask[token]
        expected[token] += factors[place].double().numpy() * passes
    expected[3] = 0  # padding
    np.testing.assert_allclose(layer.weight.grad.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_packed_table_is_the_frozen_latent_one(dtype: torch.dtype) -> None:
    embedding = table().to(dtype)
    layer = BinaryEmbedding.from_float(embedding, BinarizationConfig(), key="words", unit=0)
    assert layer.weight.dtype == torch.float32, "latent steps are smaller than half precision resolves"
    layer.set_frozen(1.0, step=1)
    packed, ids = PackedEmbedding.from_binary(layer), torch.arange(50)
    rows = packed(ids)
    assert packed.bits == 1 and packed.weight.shape == (50, 3) and rows.dtype == dtype
    assert torch.equal(rows, layer(ids))
