"""The straight-through gradient of packed layers: against the formula in float64, and against latent layers."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_stompp import BinarizationConfig, kernels
from hf_stompp.layers import BINARY, PACKED

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 24), (6, 40)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "dilated conv": (lambda: nn.Conv2d(6, 5, (3, 1), padding=(2, 0), dilation=(2, 1)), (2, 6, 9, 8)),
    "grouped conv": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
}


def made(kind: str, unsigned: bool, **config: Any) -> tuple[Any, Any]:
    """A latent layer with a scale and shifts of its own, everything frozen, and its packed copy."""
    layer = LAYERS[kind][0]()
    latent = BINARY[type(layer)].from_float(layer, BinarizationConfig(**config), key="", unit=0, unsigned=unsigned)
    with torch.no_grad():
        latent.activation_scale.fill_(0.7)
        if latent.activation_shift is not None:
            latent.activation_shift.normal_(std=0.3)
    latent.set_frozen(1.0, step=1)
    return latent, PACKED[type(layer)].from_binary(latent)


def gradient(layer: Any, x: Tensor, backend: str = "reference") -> Tensor | None:
    """Of a fixed sum of what the layer gives."""
    x = x.clone().requires_grad_()
    with kernels.use(backend):
        y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (y * weights.to(y.dtype)).sum().backward()
    return x.grad


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("clip", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_it_is_that_of_the_weights_where_the_input_is_not_clipped(
    kind: str, clip: float, unsigned: bool, backend: str
) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    latent, packed = made(kind, unsigned, surrogate="ste", clip=clip)
    x = torch.randn(LAYERS[kind][1])
    floats = copy.deepcopy(packed).to_float().double()
    passed = gradient(floats, x.double())
    centre = packed.activation_threshold.double().view(-1, *(1,) * (x.dim() - 2)) if not unsigned else 0.0
    from_centre = x.double() - centre
    inside = (from_centre >= 0) & (from_centre <= clip * 0.7) if unsigned else from_centre.abs() <= clip * 0.7
    if math.isinf(clip):
        inside = torch.ones_like(inside)  # nothing is clipped, on neither side
    assert 0.0 < inside.float().mean() < 1.0 or math.isinf(clip)
    assert torch.allclose(gradient(packed, x, backend).double(), passed * inside, rtol=1e-5, atol=1e-5)
    assert torch.allclose(gradient(packed, x, backend), gradient(latent, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_model_that_was_trained_without_has_none(kind: str, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    _, packed = made(kind, unsigned=False, surrogate="none")
    found = gradient(packed, torch.randn(LAYERS[kind][1]), backend)
    assert found is None or not found.any()


def test_half_precision_and_the_compiler() -> None:
    pytest.importorskip("numba")
    torch.manual_seed(0)
    _, packed = made("linear", unsigned=False, surrogate="ste")
    x = torch.randn(6, 40)
    expected = gradient(packed, x)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.allclose(gradient(compiled, x, "cpu"), expected, rtol=1e-5, atol=1e-6)
    half = gradient(packed, x.bfloat16(), "cpu")
    assert half.dtype == torch.bfloat16
    kept = (x.bfloat16().float() - packed.activation_threshold).abs() <= 2 * 0.7
    assert torch.equal(half != 0, kept)
    operands = packed.weight, packed.weight_scale, packed.bias, packed.activation_threshold, packed.activation_levels
    torch.library.opcheck(torch.ops.hf_stompp.packed_linear.default, (x.requires_grad_(), *operands, 2.0))
