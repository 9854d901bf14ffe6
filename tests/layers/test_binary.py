"""The latent linear layer: its masks, and that frozen weights stay frozen."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from latent_layers import make_inputs, make_latent
from torch import Tensor, nn

from hf_stompp import BinarizationConfig
from hf_stompp.layers import BinaryLinear, latent
from hf_stompp.masks import draw_mask

IN, OUT = 11, 6


make_layer, inputs = (partial(make, nn.Linear) for make in (make_latent, make_inputs))


# --- forward -------------------------------------------------------------------------------------------------------


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
