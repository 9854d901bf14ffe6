"""The mathematics against brute force over single elements, in float64."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_stompp import functional
from hf_stompp.functional import activation_threshold, mix, weight_scale

SCALE = torch.tensor([[0.5], [1.25], [2.0]], dtype=torch.float64)
MASK = torch.tensor([[i % 3 == 0 or j % 4 == 1 for j in range(12)] for i in range(3)])
MASKS = {"frozen": True, "soft": False, "mixed": MASK, "per feature": MASK[0]}


@pytest.fixture(params=[4, 1 << 30], ids=["in blocks", "whole"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors cut into blocks of a few entries, as large ones are on a CPU, or not at all."""
    monkeypatch.setattr(functional, "_BLOCK", request.param)


CASES = [
    pytest.param(unsigned, clip, mask, ste, id=f"{'unsigned' if unsigned else 'signed'}-clip={clip}-{name}-ste={ste}")
    for unsigned, clip, (name, mask), ste in product((False, True), (None, 1.0, 2.5), MASKS.items(), (False, True))
]


def latent() -> Tensor:
    """Values inside, outside and exactly on every boundary, both zeros and the nearest neighbours of zero."""
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0.0, -0.0, -1e-12, 1e-12
    x[:, 4:5], x[:, 5:6] = SCALE, -SCALE
    x[:, 6:7], x[:, 7:8] = 2.5 * SCALE, -2.5 * SCALE
    x[:, 8:9], x[:, 9:10] = SCALE / 2, SCALE / 2 - 1e-12
    return x


def elements(x: Tensor, scale: Tensor, mask: Tensor | bool) -> Iterator[tuple[tuple[int, ...], float, float, bool]]:
    """Index, value, scale and mask of each entry, as Python numbers."""
    scale = scale.expand_as(x)
    mask = torch.as_tensor(mask).expand_as(x)
    for index in np.ndindex(*x.shape):
        yield index, x[index].item(), scale[index].item(), bool(mask[index])


def brute_force(
    x: Tensor, scale: Tensor, mask: Tensor | bool, clip: float | None, unsigned: bool, ste: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value of each entry, its derivative to the latent value by the rule, and its true derivative to the scale."""
    y, dx, dscale = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for i, value, s, frozen in elements(x, scale, mask):
        low, high = (0.0 if unsigned else -1.0), 1.0
        limit = math.inf if clip is None else clip
        inside = clip is None or low * limit * s <= value <= limit * s
        upper = value >= (s / 2 if unsigned else 0.0)
        if frozen:
            factor: float | None = high if upper else low
        elif inside:
            factor = None
        else:
            factor = (high if value > 0 else low) * limit
        y[i] = value if factor is None else factor * s
        dscale[i] = 0.0 if factor is None else factor
        dx[i] = float(inside and (ste or not frozen))
    return y, dx, dscale


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(("unsigned", "clip", "mask", "ste"), CASES)
def test_mix_equals_brute_force(unsigned: bool, clip: float | None, mask: Any, ste: bool) -> None:
    x, scale = latent().requires_grad_(), SCALE.clone().requires_grad_()
    upstream = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = mix(x, scale, mask, clip=clip, unsigned=unsigned, ste=ste)
    y.backward(upstream)
    expected, dx, dscale = brute_force(x.detach(), SCALE, mask, clip, unsigned, ste)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, dx * upstream)
    torch.testing.assert_close(scale.grad, (dscale * upstream).sum(dim=1, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("unsigned", "clip", "mask", "ste"), CASES[::2])
def test_mix_forward_equals_brute_force_in_lower_precision(
    unsigned: bool, clip: float | None, mask: Any, ste: bool, dtype: torch.dtype
) -> None:
    x, scale = latent().to(dtype), SCALE.to(dtype)
    y = mix(x, scale, mask, clip=clip, unsigned=unsigned, ste=ste)
    assert y.dtype == dtype
    # All factors here are exact in every dtype, so is their product with these scales.
    expected, _, _ = brute_force(x.double(), scale.double(), mask, clip, unsigned, ste)
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("mask", [True, MASK], ids=["frozen", "mixed"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_frozen_entries_are_exactly_a_level(unsigned: bool, mask: Tensor | bool) -> None:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(3)) * 7
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(4)) * 0.3 + 1e-3
    mask = mask if mask is True else MASK.repeat(22, 1)[:64]
    y = mix(x, scale, mask, clip=2.0, unsigned=unsigned)
    levels = (torch.zeros_like(scale) if unsigned else -scale, scale)
    is_level = (y == levels[0]) | (y == levels[1])
    frozen = torch.as_tensor(mask).expand_as(x)
    assert is_level[frozen].all()
    assert not is_level[~frozen & (x.abs() < 2 * scale) & (x > 0)].any()


def test_without_mask_and_clip_nothing_changes_bit_for_bit() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -3e38, math.inf, -math.inf, math.nan, 0.1])
    y = mix(x, torch.tensor([0.3]), False, clip=None)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))
    finite = latent()
    for unsigned in (False, True):
        assert torch.equal(mix(finite, SCALE, torch.zeros(12, dtype=torch.bool), clip=None, unsigned=unsigned), finite)


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("clip", [None, 1.0, 2.5])
def test_gradcheck_where_differentiable(clip: float | None, unsigned: bool) -> None:
    # Soft entries off the kinks; frozen entries are piecewise constant in x and linear in the scale: gradcheck
    # verifies both rules numerically, with no formula of ours.
    x = torch.tensor([[-4.0, -0.7, 0.2, 0.4, 1.1, 3.9]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[1.3]], dtype=torch.float64, requires_grad=True)
    for mask in (True, False, torch.tensor([[True, False, False, True, True, False]])):

        def function(x: Tensor, scale: Tensor, mask: Tensor | bool = mask) -> Tensor:
            return mix(x, scale, mask, clip=clip, unsigned=unsigned)

        assert torch.autograd.gradcheck(function, (x, scale), eps=1e-7)


def test_ste_changes_only_frozen_entries_inside_the_clip_range() -> None:
    grads = {}
    for ste in (False, True):
        x = latent().requires_grad_()
        mix(x, SCALE, MASK, clip=1.0, ste=ste).sum().backward()
        grads[ste] = x.grad
    inside = latent().abs() <= SCALE
    assert torch.equal(grads[True] != grads[False], MASK & inside)


def test_double_backward_is_refused_rather_than_wrong() -> None:
    x = latent().requires_grad_()
    (grad,) = torch.autograd.grad(mix(x, SCALE, MASK, clip=1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_zero_scale_gives_zeros_and_no_nan() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    for mask in (True, False, torch.tensor([True, False, True])):
        y = mix(x, torch.zeros(2, 1), mask, clip=2.0, ste=True)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, torch.zeros(2, 3))
        assert torch.equal(grad, torch.ones(2, 3))


ZEROS = torch.tensor([0.0, -0.0, -1e-45, 1e-45, -1.0, 1.0])
SIGNS = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sign_of_both_zeros_is_plus_one(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, -1.0, 1.0], dtype=dtype)
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=dtype)
    assert torch.equal(mix(x, torch.ones(1, dtype=dtype), True, clip=None), signs)
    assert torch.equal(mix(x, torch.ones(1, dtype=dtype), torch.ones(4, dtype=torch.bool), clip=1.0), signs)


def test_sign_of_the_smallest_numbers() -> None:
    assert torch.equal(mix(ZEROS, torch.ones(1), True, clip=None), SIGNS)


def test_sign_of_nan_is_minus_one_like_its_bit() -> None:
    assert mix(torch.tensor([math.nan]), torch.ones(1), True, clip=None).item() == -1


@pytest.mark.parametrize("mask", [True, torch.ones(6, dtype=torch.bool)], ids=["bool", "tensor"])
@pytest.mark.parametrize("ste", [False, True], ids=["none", "ste"])
def test_sign_of_both_zeros_is_plus_one_in_a_compiled_graph(mask: Tensor | bool, ste: bool) -> None:
    def function(x: Tensor, scale: Tensor, mask: Tensor | bool) -> Tensor:
        return mix(x, scale, mask, clip=1.0, ste=ste) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x, scale = ZEROS.clone().requires_grad_(), torch.full((1,), 3.0, requires_grad=True)
    y = compiled(x, scale, mask)
    y.sum().backward()
    assert torch.equal(y, SIGNS * 6)
    assert torch.equal(x.grad, torch.full((6,), 2.0 if ste else 0.0))
    assert scale.grad.item() == 2 * SIGNS.sum().item()


def test_a_transposed_tensor_compiles() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    for mask in (True, torch.arange(4) % 2 == 0):
        y = compiled(x, torch.ones(1), mask, clip=1.0, ste=True)
        assert torch.equal(y, mix(x, torch.ones(1), mask, clip=1.0, ste=True))
        y.sum().backward()


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)], ids=["linear", "convolution"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["channel", "tensor", "none"])
def test_weight_scale_equals_numpy(granularity: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    scale = weight_scale(weight, granularity)
    magnitude = np.abs(weight.detach().double().numpy()).reshape(shape[0], -1)
    expected = {
        "channel": magnitude.mean(axis=1),
        "tensor": np.full(shape[0], magnitude.mean()),
        "none": np.ones(shape[0]),
    }[granularity]
    assert scale.shape == (shape[0],) + (1,) * (len(shape) - 1)
    assert scale.dtype == torch.float32
    assert not scale.requires_grad
    np.testing.assert_allclose(scale.flatten().double().numpy(), expected, rtol=1e-6)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("shape", [(6, 5, 3), (1, 40, 3)], ids=["batch", "one sample"])
@pytest.mark.parametrize("frozen", [True, False, None])
def test_blocks_of_a_batch_of_activations(shape: tuple[int, ...], frozen: bool | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([True, False, True]) if frozen is None else frozen
    gamma = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    y = mix(x.requires_grad_(), gamma, mask, clip=1.5, ste=True)
    y.backward(upstream)
    frozen_at = np.broadcast_to(np.array([True, False, True]) if frozen is None else frozen, shape)
    values, g = x.detach().numpy(), upstream.numpy()
    inside = np.abs(values) <= 1.5 * 0.8
    hard, clipped = np.where(values >= 0, 0.8, -0.8), np.clip(values, -1.2, 1.2)
    np.testing.assert_allclose(y.detach().numpy(), np.where(frozen_at, hard, clipped), rtol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-12)
    slope = np.where(frozen_at, np.sign(hard), np.where(inside, 0.0, 1.5 * np.sign(values)))
    np.testing.assert_allclose(gamma.grad.item(), (g * slope).sum(), rtol=1e-10)


def test_channel_scale_is_the_least_squares_scale_of_the_signs() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(6), dtype=torch.float64).numpy()
    signs = np.where(weight >= 0, 1.0, -1.0)
    expected = [np.linalg.lstsq(s[:, None], w, rcond=None)[0].item() for s, w in zip(signs, weight, strict=True)]
    np.testing.assert_allclose(weight_scale(torch.tensor(weight), "channel").flatten().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("unsigned", "shifted"), [(False, False), (False, True), (True, False)], ids=["signed", "shifted", "unsigned"]
)
def test_activation_threshold_decides_like_the_frozen_mix(unsigned: bool, shifted: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    scale, shift = torch.tensor([0.7]), torch.randn(40, generator=generator)
    threshold = activation_threshold(scale, shift if shifted else None, unsigned)
    x = torch.randn(100, 40, generator=generator)
    x[0] = threshold  # exactly on the boundary: the upper level
    x[1] = torch.nextafter(threshold.expand(40), torch.tensor(-math.inf))
    y = mix(x - shift if shifted else x, scale, True, clip=None, unsigned=unsigned)
    assert torch.equal(x >= threshold, y == scale)
    assert (y[0] == scale).all()
    assert (y[1] != scale).all()
