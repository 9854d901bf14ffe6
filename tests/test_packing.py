"""The bit layout against `numpy.packbits`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_stompp.packing import pack_signs, packed_length, unpack_signs

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
