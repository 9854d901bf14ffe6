"""The bit layout against `numpy.packbits`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_stompp.packing import pack_codes, pack_signs, packed_length, quantize_rows, unpack_codes, unpack_signs

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=70),
    elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, np.nan]),
)


@given(weight=WEIGHTS)
def test_packing_equals_numpy(weight: np.ndarray) -> None:
    packed = pack_signs(torch.from_numpy(weight))
    expected = np.packbits(weight >= 0, axis=-1, bitorder="little")
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert np.array_equal(packed.numpy(), expected)
    assert packed.shape[-1] == packed_length(weight.shape[-1])


@given(weight=WEIGHTS)
def test_round_trip_gives_the_signs(weight: np.ndarray) -> None:
    length = weight.shape[-1]
    unpacked = unpack_signs(pack_signs(torch.from_numpy(weight)), length)
    assert np.array_equal(unpacked.numpy(), np.where(weight >= 0, 1.0, -1.0))


@given(packed=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9)), data=st.data())
def test_unpacking_equals_numpy(packed: np.ndarray, data: st.DataObject) -> None:
    length = 8 * packed.shape[-1] - data.draw(st.integers(0, 7))
    expected = np.unpackbits(packed, axis=-1, bitorder="little")[..., :length]
    assert np.array_equal(unpack_signs(torch.from_numpy(packed), length).numpy(), 2.0 * expected - 1.0)


def test_both_zeros_are_bit_one() -> None:
    assert pack_signs(torch.tensor([0.0, -0.0])).item() == 0b11


def test_the_first_weight_is_the_least_significant_bit_and_the_padding_is_zero() -> None:
    weight = -torch.ones(2, 9)
    weight[0, 0] = weight[1, 8] = 1
    assert pack_signs(weight).tolist() == [[1, 0], [0, 1]]
    assert pack_signs(torch.ones(9)).tolist() == [255, 1]


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3), (768, 96)])
def test_packed_length(length: int, size: int) -> None:
    assert packed_length(length) == size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_packs_any_float_and_any_memory_layout(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 13, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    assert not weight.is_contiguous()
    expected = np.packbits(weight.double().numpy() >= 0, axis=-1, bitorder="little")
    assert np.array_equal(pack_signs(weight).numpy(), expected)


@given(data=st.data(), bits=st.sampled_from([1, 4, 8, 16]))
def test_codes_are_packed_without_gaps_least_significant_bit_first(data: st.DataObject, bits: int) -> None:
    shape = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=19)
    codes = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == packed_length(codes.shape[-1], bits)
    for row, expected in zip(
        packed.reshape(-1, packed.shape[-1]).numpy(), codes.reshape(-1, codes.shape[-1]), strict=True
    ):
        number = int.from_bytes(row.tobytes(), "little")
        assert number == sum(int(code) << bits * k for k, code in enumerate(expected))
    assert np.array_equal(unpack_codes(packed, codes.shape[-1], bits).numpy(), codes)


def values(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> np.ndarray:
    return scale.double().numpy()[:, None] * (2 * codes.double().numpy() - 2**bits + 1)


def test_one_bit_rows_are_sign_and_mean_magnitude() -> None:
    weight = torch.tensor([[0.5, -1.5, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0], [1e-20, -2e-20, 3e-20, 4e-20]])
    codes, scale = quantize_rows(weight, bits=1)
    assert codes.tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]]
    torch.testing.assert_close(scale, torch.tensor([0.5, 0.0, 2.5e-20]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "tolerance"), [(1, 1.001), (4, 1.15), (8, 1.4), (16, 1.4)])
def test_rows_are_nearly_as_close_as_the_best_scale_makes_them(bits: int, tolerance: float) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-4, 3, 5)[:, None]
    error = ((values(*quantize_rows(weight, bits), bits) - weight.double().numpy()) ** 2).sum(axis=1)
    top, w = 2**bits - 1, weight.double().numpy()
    best = np.full(5, np.inf)
    for share in np.linspace(0.02, 1.1, 1000):  # brute force over the scale
        step = share * np.abs(w).max(axis=1, keepdims=True) / top
        codes = np.clip(np.floor(w / (2 * step) + 2 ** (bits - 1)), 0, top)
        best = np.minimum(best, ((step * (2 * codes - top) - w) ** 2).sum(axis=1))
    assert (error <= tolerance * best).all(), error / best


def test_the_scale_is_the_least_squares_one_for_its_codes() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_rows(weight, bits=4)
    levels, w = 2 * codes.double().numpy() - 15, weight.double().numpy()
    np.testing.assert_allclose(scale.numpy(), (w * levels).sum(1) / (levels**2).sum(1), rtol=1e-5)
