"""The latent layer: its forward and gradients, its masks, and that frozen weights stay frozen."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_stompp import BinarizationConfig
from hf_stompp.layers import BinaryLinear, latent
from hf_stompp.masks import draw_mask

IN, OUT = 11, 6


def make_layer(*, unsigned: bool = False, bias: bool = True, key: str = "layer", **config: Any) -> BinaryLinear:
    """A small layer, always with the same weights; scale and shift off their starting values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(IN, OUT, bias=bias)
        layer = BinaryLinear.from_float(linear, BinarizationConfig(**config), key=key, unit=0, unsigned=unsigned)
        with torch.no_grad():
            if layer.activation_scale is not None:
                layer.activation_scale.fill_(0.6)
            if layer.activation_shift is not None:
                layer.activation_shift.normal_(std=0.3)
    return layer


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(4, 5, IN, generator=torch.Generator().manual_seed(seed))


# --- forward and gradients -----------------------------------------------------------------------------------------


def numpy_forward(layer: BinaryLinear, x: Tensor) -> np.ndarray:
    """The formulas of the method, in float64, from the parameters and masks of the layer."""
    config = layer.config
    clip = np.inf if config.clip is None else config.clip
    w, x64 = layer.weight.detach().double().numpy(), x.detach().double().numpy()
    if config.weights:
        alpha = {"channel": np.abs(w).mean(axis=1, keepdims=True), "tensor": np.abs(w).mean(), "none": 1.0}
        a = np.broadcast_to(alpha[config.scale], w.shape)
        w = np.where(layer.weight_mask.numpy(), np.where(w >= 0, a, -a), np.clip(w, -clip * a, clip * a))
    if config.activations:
        gamma = layer.activation_scale.item()
        if layer.activation_shift is not None:
            x64 = x64 - layer.activation_shift.detach().double().numpy()
        if layer.unsigned:
            hard, soft = np.where(x64 >= gamma / 2, gamma, 0.0), np.clip(x64, 0, clip * gamma)
            soft = x64 if config.clip is None else soft
        else:
            hard, soft = np.where(x64 >= 0, gamma, -gamma), np.clip(x64, -clip * gamma, clip * gamma)
        x64 = np.where(layer.activation_mask.numpy(), hard, soft)
    return x64 @ w.T + (0 if layer.bias is None else layer.bias.detach().double().numpy())


CONFIGS = {
    "default": {},
    "no clip": {"clip": None},
    "weights only": {"activations": False},
    "activations only": {"weights": False},
    "scale of the tensor": {"scale": "tensor"},
    "no scale": {"scale": "none", "clip": 0.1},
    "no shift": {"learn_activation_shift": False},
    "unsigned": {"unsigned": True},
    "unsigned, no clip": {"unsigned": True, "clip": None},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=list(CONFIGS))
def test_forward_equals_numpy(arguments: dict[str, Any], fraction: float) -> None:
    layer, x = make_layer(**arguments), inputs()
    layer.set_frozen(fraction, 3)
    np.testing.assert_allclose(layer(x).detach().numpy(), numpy_forward(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_gradients_equal_those_of_plain_autograd(surrogate: str, unsigned: bool, fraction: float) -> None:
    layer = make_layer(surrogate=surrogate, unsigned=unsigned, clip=1.5).double()
    layer.set_frozen(fraction, 3)
    x = inputs().double().requires_grad_()
    upstream = torch.randn(4, 5, OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    layer(x).backward(upstream)

    def reference(value: Tensor, scale: Tensor, mask: Tensor, low: float, straight: bool) -> Tensor:
        soft = torch.minimum(torch.maximum(value, 1.5 * low * scale), 1.5 * scale)
        upper = value.detach() >= (0 if low else scale.detach() / 2)
        hard = torch.where(upper, scale, low * scale)
        # Straight through: the value of one, the gradient of the other.
        return torch.where(mask, soft + (hard - soft).detach() if straight else hard, soft)

    w, g = layer.weight.detach().clone().requires_grad_(), layer.activation_scale.detach().clone().requires_grad_()
    b = None if unsigned else layer.activation_shift.detach().clone().requires_grad_()
    x2 = inputs().double().requires_grad_()
    alpha = w.detach().abs().mean(dim=1, keepdim=True).float().double()
    straight = surrogate == "ste"

    def output(scale: Tensor, straight: bool) -> Tensor:
        weight = reference(w, alpha, layer.weight_mask, -1.0, straight)
        centred = x2 if b is None else x2 - b
        value = reference(centred, scale, layer.activation_mask, 0.0 if unsigned else -1.0, straight)
        return nn.functional.linear(value, weight, layer.bias.detach())

    leaves = [w, x2] if b is None else [w, x2, b]
    grads = torch.autograd.grad((output(g, straight) * upstream).sum(), leaves, allow_unused=True)
    expected = dict(zip(("weight", "input", "shift"), grads, strict=False))
    # The scale has its true derivative with either surrogate.
    (expected["scale"],) = torch.autograd.grad((output(g, False) * upstream).sum(), g)
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
    assert layer.activation_scale.grad.abs().item() > 0.1 or fraction == 0
    if fraction == 1.0:
        assert bool(layer.weight.grad.any()) == straight
        assert bool(x.grad.any()) == straight


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_scale_and_shift_are_trained_only_if_asked_for(learned: bool) -> None:
    layer = make_layer(learn_activation_scale=learned, learn_activation_shift=learned, surrogate="ste")
    layer.set_frozen(0.5, 1)
    layer(inputs()).square().sum().backward()
    assert (layer.activation_scale.grad is not None) == learned
    if learned:
        assert layer.activation_scale.grad.item() != 0
        assert layer.activation_shift.grad.ne(0).all()
    else:
        assert layer.activation_shift is None


@pytest.mark.parametrize("surrogate", ["none", "ste"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_row_of_zeros_gives_no_nan(fraction: float, surrogate: str) -> None:
    layer = make_layer(surrogate=surrogate)
    layer.weight.data[2] = 0
    layer.set_frozen(fraction, 1)
    x = inputs().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y[..., 2], layer.bias[2].expand(4, 5))
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, *layer.parameters()))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_bfloat16_inputs_meet_float32_latent_weights(fraction: float) -> None:
    layer = make_layer()
    layer.bias.data = layer.bias.data.bfloat16()
    layer.set_frozen(fraction, 1)
    x = inputs().bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    np.testing.assert_allclose(y.detach().float().numpy(), numpy_forward(layer, x.float()), atol=0.05)


def test_a_layer_all_in_bfloat16_and_autocast() -> None:
    x = inputs()
    layer = make_layer()
    layer.set_frozen(1.0, 1)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.02)
    y = layer.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.3, rtol=0.05)


def test_forward_is_pure() -> None:
    layer = make_layer()
    layer.set_frozen(0.5, 7)
    before = {name: tensor.clone() for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    random_state = torch.get_rng_state()
    first, second = layer(inputs()), layer(inputs())
    assert torch.equal(first, second)
    assert torch.equal(random_state, torch.get_rng_state())
    after = dict([*layer.named_parameters(), *layer.named_buffers()])
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_compiled_graph_serves_every_fraction() -> None:
    layer, x = make_layer(surrogate="ste"), inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for step, fraction in enumerate((0.0, 0.3, 0.7, 1.0)):
            layer.set_frozen(fraction, step)
            torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


# --- construction and state ----------------------------------------------------------------------------------------


def test_from_float_shares_the_parameters_and_draws_nothing() -> None:
    linear = nn.Linear(IN, OUT).eval()
    random_state = torch.get_rng_state()
    layer = BinaryLinear.from_float(linear, BinarizationConfig(), key="a", unit=3, unsigned=False)
    assert torch.equal(random_state, torch.get_rng_state())
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.unit, layer.training) == (IN, OUT, 3, False)
    assert not layer.weight_mask.any()
    assert not layer.activation_mask.any()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ({}, {"activation_scale", "activation_shift"}),
        ({"unsigned": True}, {"activation_scale"}),
        ({"learn_activation_shift": False}, {"activation_scale"}),
        ({"activations": False}, set()),
    ],
    ids=["signed", "unsigned", "no shift", "weights only"],
)
def test_the_saved_state_has_no_mask(arguments: dict[str, Any], extra: set[str]) -> None:
    assert (
        set(make_layer(**arguments).state_dict())
        == {"weight", "bias", "frozen_fraction", "mask_step", "calibrated"} | extra
    )


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_loading_restores_the_masks(fraction: float) -> None:
    source, target = make_layer(refresh=0.3), make_layer(refresh=0.3)
    source.set_frozen(fraction, 12)
    target.set_frozen(0.6, 5)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(target.weight_mask, source.weight_mask)
    assert torch.equal(target.activation_mask, source.activation_mask)
    assert target.fraction == source.fraction
    assert torch.equal(target(inputs()), source(inputs()))
    assert not target.set_frozen(fraction, 12)


def test_a_full_precision_checkpoint_loads() -> None:
    layer, linear = make_layer(), nn.Linear(IN, OUT)
    layer.set_frozen(0.5, 2)
    mask = layer.weight_mask.clone()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(missing) == {"activation_scale", "activation_shift", "frozen_fraction", "mask_step", "calibrated"}
    assert unexpected == []
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.weight_mask, mask)


def test_a_deep_copy_is_equal_and_independent() -> None:
    layer = make_layer()
    layer.set_frozen(0.5, 2)
    twin = copy.deepcopy(layer)
    mask, output = layer.weight_mask.clone(), layer(inputs())
    assert torch.equal(twin(inputs()), output)
    twin.set_frozen(1.0, 3)
    twin.weight.data.zero_()
    assert layer.fraction == 0.5
    assert torch.equal(layer.weight_mask, mask)
    assert torch.equal(layer(inputs()), output)


# --- masks ---------------------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_key_the_seed_and_the_step() -> None:
    layer = make_layer(key="encoder.a", mask_seed=5, refresh=0.4, refresh_interval=2)
    assert layer.set_frozen(0.25, 9)
    arguments: dict[str, Any] = {"seed": 5, "step": 9, "refresh": 0.4, "refresh_interval": 2}
    assert torch.equal(layer.weight_mask, draw_mask((OUT, IN), 0.25, name="encoder.a.weight", **arguments))
    assert torch.equal(layer.activation_mask, draw_mask((IN,), 0.25, name="encoder.a.activation", **arguments))
    assert "frozen=0.250" in repr(layer)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the masks that are drawn."""
    shapes: list[tuple[int, ...]] = []

    def spy(shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(shape)
        return draw_mask(shape, *args, **kwargs)

    monkeypatch.setattr(latent, "draw_mask", spy)
    return shapes


def test_set_frozen_draws_only_when_the_mask_changes(draws: list[tuple[int, ...]]) -> None:
    layer = make_layer(refresh=0.5, refresh_interval=5)
    schedule = [(0.0, 1), (0.1, 2), (0.1, 3), (0.1, 4), (0.1, 5), (0.1, 9), (0.1, 10), (0.3, 11), (1.0, 12), (1.0, 20)]
    drawn = [layer.set_frozen(fraction, step) for fraction, step in schedule]
    assert drawn == [False, True, False, False, True, False, True, True, True, False]
    assert len(draws) == 2 * sum(drawn)


def test_set_frozen_without_refresh_draws_only_for_a_new_fraction(draws: list[tuple[int, ...]]) -> None:
    layer = make_layer(refresh=0.0)
    # Not a number of float32, in which the fraction is saved.
    assert [layer.set_frozen(0.1, step) for step in range(1, 6)] == [True] + [False] * 4
    assert len(draws) == 2


# --- frozen means frozen -------------------------------------------------------------------------------------------


def train_step(layer: BinaryLinear, optimizer: torch.optim.Optimizer, *, hold: bool = True) -> None:
    optimizer.zero_grad()
    (layer(inputs()) - 1).square().sum().backward()
    if hold:
        layer.hold_frozen()
    optimizer.step()
    if hold:
        layer.restore_frozen()


def trained(hold: bool = True, **config: Any) -> tuple[BinaryLinear, Callable[[float, int], tuple[Tensor, Tensor]]]:
    """A layer with momentum in its optimizer, and a function that freezes a fraction and trains two more steps: the
    mask, and which weights moved."""
    layer = make_layer(**config)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        train_step(layer, optimizer, hold=hold)

    def freeze(fraction: float, step: int) -> tuple[Tensor, Tensor]:
        layer.set_frozen(fraction, step)
        before = layer.weight.detach().clone()
        for _ in range(2):
            train_step(layer, optimizer, hold=hold)
        moved = before.view(torch.int32) != layer.weight.detach().view(torch.int32)
        return layer.weight_mask.clone(), moved

    return layer, freeze


def test_frozen_weights_keep_their_value_and_move_again_when_re_opened() -> None:
    layer, freeze = trained(surrogate="none", refresh=1.0)
    masks = []
    for fraction, step in ((0.5, 1), (0.5, 2), (0.8, 3), (0.3, 4)):
        mask, moved = freeze(fraction, step)
        assert torch.equal(moved, ~mask)
        assert 0 < mask.sum() < mask.numel()
        masks.append(mask)
    assert (masks[0] & ~masks[1]).any(), "some were re-opened, and moved"
    mask, moved = freeze(1.0, 5)
    assert mask.all()
    assert not moved.any()
    _, moved = freeze(0.0, 6)
    assert moved.all()
    assert not hasattr(layer, "_held")


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_without_hold_and_restore_the_optimizer_moves_frozen_weights(fraction: float) -> None:
    _, freeze = trained(hold=False, surrogate="none")
    mask, moved = freeze(fraction, 1)
    assert moved[mask].all()


@pytest.mark.parametrize("arguments", [{"surrogate": "ste"}, {"surrogate": "none", "weights": False}], ids=str)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_latent_weights_go_on_training_where_they_should(arguments: dict[str, Any], fraction: float) -> None:
    # With the straight-through estimator, or where only the inputs are binary. Those pass no gradient when all are
    # frozen; weight decay still moves the weight.
    _, freeze = trained(**arguments)
    _, moved = freeze(fraction, 1)
    assert moved.all()


def test_biases_scales_and_shifts_of_a_frozen_layer_go_on_training() -> None:
    layer, freeze = trained(surrogate="none")
    freeze(1.0, 1)
    before = [p.detach().clone() for p in (layer.bias, layer.activation_scale)]
    freeze(1.0, 2)
    assert all((a != b).all() for a, b in zip(before, (layer.bias, layer.activation_scale), strict=True))


def test_the_sampled_signs_are_all_signs_of_a_small_layer_and_even_samples_of_a_large_one() -> None:
    layer = make_layer()
    layer.weight.data[0, :2] = torch.tensor([0.0, -0.0])
    assert np.array_equal(layer.sampled_signs().numpy(), layer.weight.detach().numpy().ravel() >= 0)
    large = BinaryLinear.from_float(nn.Linear(500, 300), BinarizationConfig(), key="a", unit=0, unsigned=False)
    signs = large.sampled_signs()
    assert latent.SAMPLED_SIGNS / 2 < signs.numel() <= latent.SAMPLED_SIGNS
    assert np.array_equal(signs.numpy(), (large.weight.detach().numpy() >= 0).ravel()[::3])
