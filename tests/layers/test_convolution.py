"""The latent convolution: every geometry, masks of channels, layouts, and what it keeps of an `nn.Conv2d`."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from latent_layers import make_float, make_inputs, make_latent
from numpy_latent import forward
from torch import nn

from hf_stompp import BinarizationConfig, kernels
from hf_stompp.layers import BinaryConv2d

IN, OUT = 6, 8
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "1x1": {"kernel_size": 1},
    "padded": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "1x1, stride": {"kernel_size": 1, "stride": 2},
    "of two sizes": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "padding larger than the kernel": {"padding": 4},
    "same": {"padding": "same"},
    "same, even and dilated": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": IN, "out_channels": IN, "padding": 1},
    "depthwise with a multiplier": {"groups": IN, "out_channels": 2 * IN, "stride": 2},
    "no bias": {"bias": False, "padding": 1},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "circular, same": {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
    "replicate": {"padding": 1, "stride": 2, "padding_mode": "replicate"},
}


make_conv, make_layer, images = (partial(make, nn.Conv2d) for make in (make_float, make_latent, make_inputs))


# --- geometries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_forward_of_every_geometry_equals_brute_force(
    geometry: dict[str, Any], unsigned: bool, fraction: float
) -> None:
    layer = make_layer(geometry, unsigned=unsigned)
    layer.set_frozen(fraction, 1)
    for mask in (layer.weight_mask, layer.activation_mask):
        assert 0 < mask.sum() < mask.numel() or fraction == 1.0
    found = layer(images()).detach().numpy()
    np.testing.assert_allclose(found, forward(layer, images()), rtol=1e-4, atol=1e-5)


def test_zero_padding_is_no_level() -> None:
    # Every input is the lower level and every weight +1: a sum is the number of taps inside of the image.
    layer = make_layer(
        {"padding": 1, "bias": False, "in_channels": 1, "out_channels": 1}, learn_activation_shift=False
    )
    layer.set_frozen(1.0, 1)
    layer.weight.data.fill_(1.0)
    layer.activation_scale.data.fill_(1.0)
    inside = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]])
    assert torch.equal(layer(torch.full((1, 1, 3, 3), -2.0))[0, 0], -inside)


# --- channels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_a_channel_is_frozen_in_all_its_pixels_or_in_none(unsigned: bool) -> None:
    layer = make_layer(unsigned=unsigned)
    layer.set_frozen(0.5, 1)
    assert layer.activation_mask.shape == (IN,)
    x = images()
    levels = layer.effective_input(x).detach().movedim(1, 0).flatten(1)
    low, high = (0.0 if unsigned else -layer.activation_scale.item()), layer.activation_scale.item()
    binary = torch.stack([torch.isin(channel, torch.tensor([low, high])).all() for channel in levels])
    assert torch.equal(binary, layer.activation_mask)
    assert 0 < binary.sum() < IN


# --- layouts and dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("size", [9, 60], ids=["small", "large enough for a kernel"])
def test_channels_last_gives_the_same_values(size: int, unsigned: bool, fraction: float) -> None:
    layer = make_layer({"padding": 1}, surrogate="ste", unsigned=unsigned)
    layer.set_frozen(fraction, 1)
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        x = images(2, IN, size, size).contiguous(memory_format=order).requires_grad_()
        layer.zero_grad()
        mixed = layer.effective_input(x)
        assert mixed.is_contiguous(memory_format=order)
        y = layer(x)
        y.square().mean().backward()
        results.append((mixed, y, x.grad, *(p.grad for p in layer.parameters())))
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_in_channels_last_gives_the_same_values() -> None:
    layer = make_layer({"padding": 1})
    layer.set_frozen(0.5, 1)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert twin.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(twin.effective_weight(), layer.effective_weight())
    x = images()
    torch.testing.assert_close(twin(x.contiguous(memory_format=torch.channels_last)), layer(x), rtol=1e-5, atol=1e-6)
    twin.set_frozen(1.0, 2)
    layer.set_frozen(1.0, 2)
    assert torch.equal(twin.effective_weight(), layer.effective_weight())


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_large_images_give_the_same_with_and_without_kernels(
    unsigned: bool, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer({"padding": 1}, surrogate="ste", unsigned=unsigned)
    layer.set_frozen(fraction, 1)
    results = []
    for backend in (kernels.backend(), "reference"):
        monkeypatch.setattr(kernels, "backend", lambda backend=backend: backend)
        x = images(8, IN, 40, 40).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.square().mean().backward()
        results.append((y.detach(), x.grad, layer.weight.grad.clone(), layer.activation_scale.grad.clone()))
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert torch.equal(ours, theirs) if i < 3 else torch.allclose(ours, theirs, rtol=1e-4)


def test_an_image_without_a_batch() -> None:
    layer = make_layer({"padding": 1})
    layer.set_frozen(0.5, 1)
    x = images()
    torch.testing.assert_close(torch.stack([layer(image) for image in x]), layer(x), rtol=1e-5, atol=1e-6)


def test_a_half_precision_layer_gets_float32_latent_weights() -> None:
    conv = make_conv().bfloat16()
    layer = BinaryConv2d.from_float(conv, BinarizationConfig(), key="a", unit=0, unsigned=False)
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, conv.weight.float())
    assert layer.activation_scale.dtype == torch.float32
    assert layer(images().bfloat16()).dtype == torch.bfloat16


# --- construction and state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_nothing_frozen_and_no_clip_is_the_convolution_bit_for_bit(geometry: dict[str, Any]) -> None:
    conv = make_conv(**geometry)
    layer = BinaryConv2d.from_float(conv, BinarizationConfig(clip=None), key="a", unit=0, unsigned=False)
    assert torch.equal(layer(images()), conv(images()))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_from_float_keeps_what_a_convolution_has_and_draws_nothing(geometry: dict[str, Any]) -> None:
    conv = make_conv(**geometry).eval()
    random_state = torch.get_rng_state()
    layer = BinaryConv2d.from_float(conv, BinarizationConfig(), key="a", unit=3, unsigned=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight is conv.weight and layer.bias is conv.bias
    # All that a Conv2d is made of, by its own account.
    own = {name: value for name, value in vars(conv).items() if not name.startswith("_") and name != "training"}
    assert {"stride", "padding", "dilation", "groups", "padding_mode"} <= own.keys()
    assert {name: getattr(layer, name) for name in own} == own
    assert layer.extra_repr().startswith(conv.extra_repr())
    assert (layer.unit, layer.training, layer.input_features) == (3, False, IN)
    assert layer.weight_mask.shape == conv.weight.shape and layer.activation_mask.shape == (IN,)
    assert not layer.weight_mask.any() and not layer.activation_mask.any()


@pytest.mark.parametrize("surrogate", ["none", "ste"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_frozen_weights_keep_their_value_unless_straight_through(fraction: float, surrogate: str) -> None:
    layer = make_layer({"padding": 1, "groups": 2}, surrogate=surrogate)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)

    def train_step() -> None:
        optimizer.zero_grad()
        (layer(images()) - 1).square().sum().backward()
        layer.hold_frozen()
        optimizer.step()
        layer.restore_frozen()

    train_step()
    layer.set_frozen(fraction, 1)
    before = layer.weight.detach().clone()
    train_step()
    moved = before.view(torch.int32) != layer.weight.detach().view(torch.int32)
    assert torch.equal(moved, ~layer.weight_mask) if surrogate == "none" else moved.all()
