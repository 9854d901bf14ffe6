"""The latent convolution: forward and gradients, masks of channels, layouts, and what it keeps of an `nn.Conv2d`."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy_convolution import convolve
from torch import Tensor, nn

from hf_stompp import BinarizationConfig, kernels
from hf_stompp.layers import BinaryConv2d
from hf_stompp.masks import draw_mask

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


def make_conv(**geometry: Any) -> nn.Conv2d:
    """A small convolution, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(**({"in_channels": IN, "out_channels": OUT, "kernel_size": 3} | geometry))


def make_layer(
    geometry: dict[str, Any] | None = None, *, unsigned: bool = False, key: str = "layer", **config: Any
) -> BinaryConv2d:
    """Its latent layer; scale and shift off their starting values."""
    conv, rules = make_conv(**(geometry or {})), BinarizationConfig(**config)
    layer = BinaryConv2d.from_float(conv, rules, key=key, unit=0, unsigned=unsigned)
    with torch.no_grad():
        if layer.activation_scale is not None:
            layer.activation_scale.fill_(0.6)
        if layer.activation_shift is not None:
            layer.activation_shift.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return layer


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (2, IN, 7, 6), generator=torch.Generator().manual_seed(seed))


# --- forward and gradients -----------------------------------------------------------------------------------------


def numpy_forward(layer: BinaryConv2d, x: Tensor) -> np.ndarray:
    """The formulas of the method, in float64, from the parameters and masks of the layer."""
    config = layer.config
    clip = np.inf if config.clip is None else config.clip
    w, x64 = layer.weight.detach().double().numpy(), x.detach().double().numpy()
    if config.weights:
        mean = np.abs(w).mean(axis=(1, 2, 3), keepdims=True)
        alpha = np.broadcast_to({"channel": mean, "tensor": np.abs(w).mean(), "none": 1.0}[config.scale], w.shape)
        w = np.where(layer.weight_mask, np.where(w >= 0, alpha, -alpha), np.clip(w, -clip * alpha, clip * alpha))
    if config.activations:
        gamma, frozen = layer.activation_scale.item(), layer.activation_mask.numpy()[:, None, None]
        if layer.activation_shift is not None:
            x64 = x64 - layer.activation_shift.detach().double().numpy()[:, None, None]
        if layer.unsigned:
            soft = x64 if config.clip is None else np.clip(x64, 0, clip * gamma)
            x64 = np.where(frozen, np.where(x64 >= gamma / 2, gamma, 0.0), soft)
        else:
            soft = np.clip(x64, -clip * gamma, clip * gamma)
            x64 = np.where(frozen, np.where(x64 >= 0, gamma, -gamma), soft)
    return convolve(layer, x64, w)


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
    np.testing.assert_allclose(found, numpy_forward(layer, images()), rtol=1e-4, atol=1e-5)


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no clip": {"clip": None},
    "weights only": {"activations": False},
    "activations only": {"weights": False},
    "scale of the tensor": {"scale": "tensor"},
    "no scale": {"scale": "none", "clip": 0.1},
    "no shift": {"learn_activation_shift": False},
    "unsigned": {"unsigned": True},
    "unsigned, no clip": {"unsigned": True, "clip": None},
}


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=list(CONFIGS))
def test_forward_under_every_rule_equals_brute_force(arguments: dict[str, Any], fraction: float) -> None:
    layer = make_layer({"padding": 1, "stride": 2, "groups": 2}, **arguments)
    layer.set_frozen(fraction, 1)
    found = layer(images()).detach().numpy()
    np.testing.assert_allclose(found, numpy_forward(layer, images()), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("clip", [1.5, None])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_gradients_equal_those_of_plain_autograd(
    surrogate: str, unsigned: bool, fraction: float, clip: float | None
) -> None:
    geometry = {"padding": 1, "stride": 2, "groups": 2}
    layer = make_layer(geometry, surrogate=surrogate, unsigned=unsigned, clip=clip).double()
    layer.set_frozen(fraction, 1)
    x = images().double().requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y.backward(upstream)

    def reference(value: Tensor, scale: Tensor, mask: Tensor, low: float, straight: bool) -> Tensor:
        soft = value if clip is None else torch.minimum(torch.maximum(value, clip * low * scale), clip * scale)
        upper = value.detach() >= (0 if low else scale.detach() / 2)
        hard = torch.where(upper, scale, low * scale)
        # Straight through: the value of one, the gradient of the other.
        return torch.where(mask, soft + (hard - soft).detach() if straight else hard, soft)

    w, g = layer.weight.detach().clone().requires_grad_(), layer.activation_scale.detach().clone().requires_grad_()
    b = None if unsigned else layer.activation_shift.detach().clone().requires_grad_()
    x2 = images().double().requires_grad_()
    alpha = w.detach().abs().mean(dim=(1, 2, 3), keepdim=True).float().double()
    straight = surrogate == "ste"

    def output(scale: Tensor, straight: bool) -> Tensor:
        weight = reference(w, alpha, layer.weight_mask, -1.0, straight)
        centred = x2 if b is None else x2 - b[:, None, None]
        mask = layer.activation_mask[:, None, None]
        value = reference(centred, scale, mask, 0.0 if unsigned else -1.0, straight)
        return nn.functional.conv2d(value, weight, layer.bias.detach(), stride=2, padding=1, groups=2)

    leaves = [w, x2] if b is None else [w, x2, b]
    grads = torch.autograd.grad((output(g, straight) * upstream).sum(), leaves, allow_unused=True)
    expected = dict(zip(("weight", "input", "shift"), grads, strict=False))
    # The scale has its true derivative with either surrogate.
    (expected["scale"],) = torch.autograd.grad((output(g, False) * upstream).sum(), g, allow_unused=True)
    found = {"weight": layer.weight.grad, "input": x.grad, "scale": layer.activation_scale.grad}
    if b is not None:
        found["shift"] = layer.activation_shift.grad
    for name, gradient in found.items():
        other = expected[name]
        other = torch.zeros_like(gradient) if other is None else other
        # The weight scale is in float32.
        torch.testing.assert_close(
            gradient, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    frozen = layer.activation_mask
    if surrogate == "none":
        assert not layer.weight.grad[layer.weight_mask].any()
        assert not x.grad[:, frozen].any()
    elif fraction > 0:
        assert layer.weight.grad[layer.weight_mask].any()
        assert x.grad[:, frozen].any()
    assert fraction == 1.0 or (layer.weight.grad[~layer.weight_mask].any() and x.grad[:, ~frozen].any())


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_an_output_of_zero_weights_gives_no_nan(fraction: float) -> None:
    layer = make_layer({"padding": 1}, surrogate="ste")
    layer.weight.data[2] = 0
    layer.set_frozen(fraction, 1)
    x = images().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y[:, 2], layer.bias[2].expand(y[:, 2].shape))
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, *layer.parameters()))


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


def test_masks_are_those_of_the_key_the_seed_and_the_step() -> None:
    layer = make_layer({"groups": 2}, key="encoder.a", mask_seed=5, refresh=0.4, refresh_interval=2)
    assert layer.set_frozen(0.25, 9)
    arguments: dict[str, Any] = {"seed": 5, "step": 9, "refresh": 0.4, "refresh_interval": 2}
    shape = (OUT, IN // 2, 3, 3)
    assert torch.equal(layer.weight_mask, draw_mask(shape, 0.25, name="encoder.a.weight", **arguments))
    assert torch.equal(layer.activation_mask, draw_mask((IN,), 0.25, name="encoder.a.activation", **arguments))
    assert "kernel_size=(3, 3)" in repr(layer) and "frozen=0.250" in repr(layer)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_scale_and_shift_are_trained_only_if_asked_for(learned: bool) -> None:
    layer = make_layer(learn_activation_scale=learned, learn_activation_shift=learned, surrogate="ste")
    layer.set_frozen(0.5, 1)
    layer(images()).square().sum().backward()
    assert (layer.activation_scale.grad is not None) == learned
    if learned:
        assert layer.activation_scale.grad.item() != 0
        assert layer.activation_shift.shape == (IN,) and layer.activation_shift.grad.ne(0).all()
    else:
        assert layer.activation_shift is None


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


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_bfloat16_inputs_meet_float32_latent_weights(fraction: float) -> None:
    layer = make_layer({"padding": 1})
    layer.bias.data = layer.bias.data.bfloat16()
    layer.set_frozen(fraction, 1)
    x = images().bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    np.testing.assert_allclose(y.detach().float().numpy(), numpy_forward(layer, x.float()), atol=0.1)


def test_a_half_precision_layer_gets_float32_latent_weights() -> None:
    conv = make_conv().bfloat16()
    layer = BinaryConv2d.from_float(conv, BinarizationConfig(), key="a", unit=0, unsigned=False)
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, conv.weight.float())
    assert layer.activation_scale.dtype == torch.float32
    assert layer(images().bfloat16()).dtype == torch.bfloat16


def test_forward_is_pure() -> None:
    layer = make_layer()
    layer.set_frozen(0.5, 7)
    before = {name: tensor.clone() for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    random_state = torch.get_rng_state()
    assert torch.equal(layer(images()), layer(images()))
    assert torch.equal(random_state, torch.get_rng_state())
    after = dict([*layer.named_parameters(), *layer.named_buffers()])
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


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


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ({}, {"bias", "activation_scale", "activation_shift"}),
        ({"unsigned": True}, {"bias", "activation_scale"}),
        ({"learn_activation_shift": False}, {"bias", "activation_scale"}),
        ({"activations": False}, {"bias"}),
        ({"geometry": {"bias": False}}, {"activation_scale", "activation_shift"}),
    ],
    ids=["signed", "unsigned", "no shift", "weights only", "no bias"],
)
def test_the_saved_state_has_no_mask(arguments: dict[str, Any], extra: set[str]) -> None:
    state = {"weight", "frozen_fraction", "mask_step", "calibrated"}
    assert set(make_layer(**arguments).state_dict()) == state | extra


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_loading_restores_the_masks(fraction: float) -> None:
    source, target = make_layer(refresh=0.3), make_layer(refresh=0.3)
    source.set_frozen(fraction, 12)
    target.set_frozen(0.6, 5)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(target.weight_mask, source.weight_mask)
    assert torch.equal(target.activation_mask, source.activation_mask)
    assert torch.equal(target(images()), source(images()))
    assert not target.set_frozen(fraction, 12)


def test_a_full_precision_checkpoint_loads() -> None:
    layer, conv = make_layer(), nn.Conv2d(IN, OUT, 3)
    missing, unexpected = layer.load_state_dict(conv.state_dict(), strict=False)
    assert set(missing) == {"activation_scale", "activation_shift", "frozen_fraction", "mask_step", "calibrated"}
    assert unexpected == []
    assert torch.equal(layer.weight, conv.weight)


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
