"""What latent linear layers and convolutions have in common: formulas, gradients, and what is saved."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from latent_layers import make_float, make_inputs, make_latent
from numpy_latent import forward
from torch import Tensor, nn

from hf_stompp.layers import BinaryLayer
from hf_stompp.masks import draw_mask

CONV: dict[str, Any] = {"padding": 1, "stride": 2, "groups": 2}


@pytest.fixture(params=[nn.Linear, nn.Conv2d], ids=["linear", "convolution"])
def kind(request: pytest.FixtureRequest) -> type[nn.Module]:
    """The class that the latent layer is made from."""
    return request.param


def make_layer(kind: type[nn.Module], arguments: dict[str, Any] | None = None, **config: Any) -> BinaryLayer:
    return make_latent(kind, (CONV if kind is nn.Conv2d else {}) | (arguments or {}), **config)


def features_last(layer: BinaryLayer, x: Tensor) -> Tensor:
    return x.movedim(layer.FEATURE_AXIS, -1)


# --- forward and gradients -----------------------------------------------------------------------------------------


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no clip": {"clip": None},
    "no clip of weights": {"clip_weights": False},
    "weights only": {"activations": False},
    "activations only": {"weights": False},
    "scale of the tensor": {"scale": "tensor"},
    "no scale": {"scale": "none", "clip": 0.1},
    "no shift": {"learn_activation_shift": False},
    "unsigned": {"unsigned": True},
    "unsigned, no clip": {"unsigned": True, "clip": None},
    "no bias": {"arguments": {"bias": False}},
}


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=list(CONFIGS))
def test_forward_under_every_rule_equals_numpy(
    arguments: dict[str, Any], fraction: float, kind: type[nn.Module]
) -> None:
    layer, x = make_layer(kind, **arguments), make_inputs(kind)
    layer.set_frozen(fraction, 3)
    np.testing.assert_allclose(layer(x).detach().numpy(), forward(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [1.5, None, "of inputs"])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_gradients_equal_those_of_plain_autograd(
    surrogate: str, unsigned: bool, fraction: float, clip: Any, kind: type[nn.Module]
) -> None:
    clipped = {"clip": 1.5, "clip_weights": False} if clip == "of inputs" else {"clip": clip}
    layer = make_layer(kind, surrogate=surrogate, unsigned=unsigned, **clipped).double()
    layer.set_frozen(fraction, 3)
    x = make_inputs(kind).double().requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y.backward(upstream)
    found = {"weight": layer.weight.grad, "input": x.grad, "scale": layer.activation_scale.grad}
    if not unsigned:
        found["shift"] = layer.activation_shift.grad
    for name, expected in plain_gradients(layer, upstream).items():
        # The weight scale is in float32.
        torch.testing.assert_close(
            found.pop(name), expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not found
    assert layer.activation_scale.grad.abs().item() > 1e-3 or fraction == 0
    of_inputs = features_last(layer, x.grad)
    for gradient, mask in ((layer.weight.grad, layer.weight_mask), (of_inputs, layer.activation_mask)):
        frozen = mask.expand_as(gradient)
        assert bool(gradient[frozen].any()) == (surrogate == "ste" and fraction > 0)
        assert gradient[~frozen].any() or fraction == 1.0


def plain_gradients(layer: BinaryLayer, upstream: Tensor) -> dict[str, Tensor]:
    """By autograd, from the formulas."""
    config, straight = layer.config, layer.config.surrogate == "ste"
    kind, features = (nn.Conv2d, (-1, 1, 1)) if isinstance(layer, nn.Conv2d) else (nn.Linear, (-1,))
    x, w, scale = (
        t.detach().clone().requires_grad_() for t in (make_inputs(kind).double(), layer.weight, layer.activation_scale)
    )
    leaves = {"weight": w, "input": x}
    if not layer.unsigned:
        leaves["shift"] = layer.activation_shift.detach().clone().requires_grad_()
    alpha = w.detach().abs().flatten(1).mean(dim=1).float().double().view(-1, *(1,) * (w.dim() - 1))

    def mixture(value: Tensor, scale: Tensor, mask: Tensor, low: float, clip: float | None, straight: bool) -> Tensor:
        soft = value if clip is None else torch.minimum(torch.maximum(value, clip * low * scale), clip * scale)
        upper = value.detach() >= (0 if low else scale.detach() / 2)
        hard = torch.where(upper, scale, low * scale)
        # Straight through: the value of one, the gradient of the other.
        return torch.where(mask, soft + (hard - soft).detach() if straight else hard, soft)

    def output(straight: bool) -> Tensor:
        weight = mixture(w, alpha, layer.weight_mask, -1.0, config.clip if config.clip_weights else None, straight)
        centred = x - leaves["shift"].view(features) if "shift" in leaves else x
        low = 0.0 if layer.unsigned else -1.0
        value = mixture(centred, scale, layer.activation_mask.view(features), low, config.clip, straight)
        if kind is nn.Linear:
            return nn.functional.linear(value, weight, layer.bias.detach())
        return nn.functional.conv2d(value, weight, layer.bias.detach(), **CONV)

    def gradients(straight: bool, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = (output(straight) * upstream).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    # The scale has its true derivative with either surrogate.
    return gradients(straight, leaves) | gradients(False, {"scale": scale})


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_scale_and_shift_are_trained_only_if_asked_for(learned: bool, kind: type[nn.Module]) -> None:
    layer = make_layer(kind, learn_activation_scale=learned, learn_activation_shift=learned, surrogate="ste")
    layer.set_frozen(0.5, 1)
    layer(make_inputs(kind)).square().sum().backward()
    assert (layer.activation_scale.grad is not None) == learned
    if learned:
        assert layer.activation_scale.grad.item() != 0
        assert layer.activation_shift.shape == (layer.input_features,) and layer.activation_shift.grad.ne(0).all()
    else:
        assert layer.activation_shift is None


@pytest.mark.parametrize("surrogate", ["none", "ste"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_an_output_of_zero_weights_gives_no_nan(fraction: float, surrogate: str, kind: type[nn.Module]) -> None:
    layer = make_layer(kind, surrogate=surrogate)
    layer.weight.data[2] = 0
    layer.set_frozen(fraction, 1)
    x = make_inputs(kind).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    zeros = features_last(layer, y)[..., 2]
    assert torch.equal(zeros, layer.bias[2].expand(zeros.shape))
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, *layer.parameters()))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_bfloat16_inputs_meet_float32_latent_weights(fraction: float, kind: type[nn.Module]) -> None:
    layer = make_layer(kind)
    layer.bias.data = layer.bias.data.bfloat16()
    layer.set_frozen(fraction, 1)
    x = make_inputs(kind).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    np.testing.assert_allclose(y.detach().float().numpy(), forward(layer, x.float()), atol=0.05)


def test_forward_is_pure(kind: type[nn.Module]) -> None:
    layer, x = make_layer(kind), make_inputs(kind)
    layer.set_frozen(0.5, 7)
    before = {name: tensor.clone() for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    random_state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(random_state, torch.get_rng_state())
    after = dict([*layer.named_parameters(), *layer.named_buffers()])
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- masks and state -----------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_key_the_seed_and_the_step(kind: type[nn.Module]) -> None:
    layer = make_layer(kind, key="encoder.a", mask_seed=5, refresh=0.4, refresh_interval=2)
    assert layer.set_frozen(0.25, 9)
    arguments: dict[str, Any] = {"seed": 5, "step": 9, "refresh": 0.4, "refresh_interval": 2}
    shapes = {"weight": tuple(layer.weight.shape), "activation": (layer.input_features,)}
    for name, shape in shapes.items():
        expected = draw_mask(shape, 0.25, name=f"encoder.a.{name}", **arguments)
        assert torch.equal(getattr(layer, f"{name}_mask"), expected)
    assert "frozen=0.250" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ({}, {"bias", "activation_scale", "activation_shift"}),
        ({"unsigned": True}, {"bias", "activation_scale"}),
        ({"learn_activation_shift": False}, {"bias", "activation_scale"}),
        ({"activations": False}, {"bias"}),
        ({"arguments": {"bias": False}}, {"activation_scale", "activation_shift"}),
    ],
    ids=["signed", "unsigned", "no shift", "weights only", "no bias"],
)
def test_the_saved_state_has_no_mask(arguments: dict[str, Any], extra: set[str], kind: type[nn.Module]) -> None:
    state = {"weight", "frozen_fraction", "mask_step", "calibrated"}
    assert set(make_layer(kind, **arguments).state_dict()) == state | extra


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_loading_restores_the_masks(fraction: float, kind: type[nn.Module]) -> None:
    source, target = make_layer(kind, refresh=0.3), make_layer(kind, refresh=0.3)
    source.set_frozen(fraction, 12)
    target.set_frozen(0.6, 5)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(target.weight_mask, source.weight_mask)
    assert torch.equal(target.activation_mask, source.activation_mask)
    assert target.fraction == source.fraction
    assert torch.equal(target(make_inputs(kind)), source(make_inputs(kind)))
    assert not target.set_frozen(fraction, 12)


def test_a_full_precision_checkpoint_loads(kind: type[nn.Module]) -> None:
    layer, checkpoint = make_latent(kind), make_float(kind).state_dict()
    checkpoint["weight"] = checkpoint["weight"] + 1
    layer.set_frozen(0.5, 2)
    mask = layer.weight_mask.clone()
    missing, unexpected = layer.load_state_dict(checkpoint, strict=False)
    assert set(missing) == {"activation_scale", "activation_shift", "frozen_fraction", "mask_step", "calibrated"}
    assert unexpected == []
    assert torch.equal(layer.weight, checkpoint["weight"])
    assert torch.equal(layer.weight_mask, mask)
