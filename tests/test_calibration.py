"""`calibrate` on convolutions: batch norms keep their statistics, but for what the shifts are made up for by."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from image_model import ImageModel
from numpy_convolution import batch_norm, convolve
from numpy_latent import lloyd_level
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stompp import BinarizationConfig, binarize, calibrate
from hf_stompp.patching import binary_layers

Factory = Callable[..., Any]
FULL_PRECISION = BinarizationConfig(clip=None)


class Chain(ImageModel):
    """Convolutions in a row with signed inputs, of every kind of compensation. Their inputs are far off zero."""

    def add_layers(self, padding: int = 0, running: bool = True) -> None:
        self.stem = nn.Conv2d(3, 6, 3)
        self.plain = nn.Conv2d(6, 8, 3, stride=2, padding=padding, bias=False)
        self.plain_norm = nn.BatchNorm2d(8, track_running_stats=running)
        self.grouped = nn.Conv2d(8, 12, (3, 2), groups=4, bias=False)
        self.grouped_norm = nn.BatchNorm2d(12, track_running_stats=running)
        self.biased = nn.Conv2d(12, 6, 1)
        self.biased_norm = nn.BatchNorm2d(6, track_running_stats=running)
        self.lonely = nn.Conv2d(6, 5, 2, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.tanh(self.stem(pixel_values))
        x = torch.tanh(self.plain_norm(self.plain(x)))
        x = torch.tanh(self.grouped_norm(self.grouped(x)))
        x = torch.tanh(self.biased_norm(self.biased(x)))
        return self.lonely(x)


CONVOLUTIONS = ("plain", "grouped", "biased", "lonely")


def make_chain(**arguments: Any) -> Chain:
    """In eval mode, always with the same weights, and running statistics that are not those of `images()`."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        chain = Chain(**arguments).eval()
        for name, tensor in chain.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0.4, 0.2)
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
        for name, tensor in chain.named_buffers():
            if name.endswith("running_mean"):
                tensor.normal_(std=0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
    return chain


def images(seed: int = 0, size: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(size, 3, 20, 17, generator=generator)}


def inputs_in_training(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The input of every layer of a copy whose batch norms, but no dropout, are in training mode, in float64."""
    found: dict[str, np.ndarray] = {}
    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: args[0].detach().double().numpy()})
            )
    with torch.no_grad():
        twin(**batch)
    return found


def taken_by(weight: np.ndarray, shift: np.ndarray, groups: int) -> np.ndarray:
    """What a shift of the input channels takes from each output channel."""
    outputs, channels = weight.shape[:2]
    taken = np.zeros(outputs)
    for o in range(outputs):
        for c in range(channels):
            taken[o] += weight[o, c].sum() * shift[o // (outputs // groups) * channels + c]
    return taken


# --- what is learned from a batch ------------------------------------------------------------------------------------


def test_scales_and_shifts_are_those_under_the_statistics_of_the_batch() -> None:
    model = make_chain()
    seen = inputs_in_training(model, images())
    layers = binary_layers(binarize(model, FULL_PRECISION))
    assert tuple(layers) == CONVOLUTIONS
    calibrate(model, images())
    for name, layer in layers.items():
        mean = seen[name].mean(axis=(0, 2, 3))
        assert np.abs(mean).max() > 0.1
        shift = np.zeros_like(mean) if name == "lonely" else mean
        np.testing.assert_allclose(layer.activation_shift.detach().numpy(), shift, atol=1e-5, err_msg=name)
        scale = np.abs(seen[name] - shift[:, None, None]).mean()
        assert layer.activation_scale.item() == pytest.approx(scale, rel=1e-4), name
        assert layer.calibrated


@pytest.mark.parametrize("vision", ["resnet-18", "mobilenet-v2"])
def test_nets_from_scratch_are_calibrated_under_batch_statistics(
    vision: str, tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    # Their running statistics say nothing yet: by those, MobileNet's signals die out.
    model = tiny_vision_model(vision, trained=False)
    batch = {"pixel_values": tiny_images(model, 6)}
    seen = inputs_in_training(model, batch)
    calibrate(binarize(model, FULL_PRECISION), batch)
    for name, layer in binary_layers(model).items():
        x = seen[name]
        if not layer.unsigned:
            x = x - x.mean(axis=(0, 2, 3), keepdims=True)
        expected = lloyd_level(x) if layer.unsigned else np.abs(x).mean()
        assert layer.activation_scale.item() == pytest.approx(expected, rel=1e-3), name
        assert 0.05 < layer.activation_scale.item() < 20


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_each_layer_sees_what_calibrated_frozen_layers_give(
    fraction: float, tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    model = binarize(tiny_vision_model("resnet-18"))
    batch = {"pixel_values": tiny_images(model, 6)}
    for layer in binary_layers(model).values():
        layer.set_frozen(fraction, 1)
    calibrate(model, batch)
    seen = inputs_in_training(model, batch)
    for name, layer in binary_layers(model).items():
        assert layer.activation_scale.item() == pytest.approx(lloyd_level(seen[name]), rel=1e-4), name


def test_only_the_units_that_are_asked_for_are_set() -> None:
    model = binarize(make_chain(), FULL_PRECISION)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, images(), units=[1])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        "grouped.activation_scale",
        "grouped.activation_shift",
        "grouped.calibrated",
        "grouped_norm.running_mean",
    }


# --- what is left as it was ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norms_keep_their_statistics_but_for_the_compensation(training: bool) -> None:
    model = binarize(make_chain(), FULL_PRECISION).train(training)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, images())
    assert all(module.training is training for module in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    set_by_it = {f"{name}.{kind}" for name in CONVOLUTIONS for kind in ("activation_scale", "calibrated")}
    set_by_it |= {f"{name}.activation_shift" for name in CONVOLUTIONS if name != "lonely"}
    assert changed == set_by_it | {"plain_norm.running_mean", "grouped_norm.running_mean", "biased.bias"}
    for name in ("plain", "grouped", "biased"):
        layer = model.get_submodule(name)
        weight = layer.weight.detach().double().numpy()
        taken = taken_by(weight, layer.activation_shift.detach().double().numpy(), layer.groups)
        assert np.abs(taken).max() > 0.1
        key, sign = ("biased.bias", 1) if name == "biased" else (f"{name}_norm.running_mean", -1)
        moved = (model.state_dict()[key] - before[key]).numpy()
        np.testing.assert_allclose(moved, sign * taken, rtol=1e-4, atol=1e-5)


def test_batch_norms_of_a_net_with_unsigned_inputs_keep_all_they_have(
    tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    model = binarize(tiny_vision_model("resnet-50"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "normalization" in name}
    calibrate(model, {"pixel_values": tiny_images(model, 4)})
    assert len(before) > 20
    assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in before.items())


def test_what_a_frozen_weight_gives_is_what_is_made_up_for() -> None:
    model = binarize(make_chain(), BinarizationConfig())
    for layer in binary_layers(model).values():
        layer.set_frozen(0.5, 1)
    before = model.grouped_norm.running_mean.clone()
    calibrate(model, images())
    layer = model.grouped
    w, mask = layer.weight.detach().double().numpy(), layer.weight_mask.numpy()
    alpha = np.abs(w).mean(axis=(1, 2, 3), keepdims=True) * np.ones_like(w)
    mixed = np.where(mask, np.where(w >= 0, alpha, -alpha), np.clip(w, -2 * alpha, 2 * alpha))
    taken = taken_by(mixed, layer.activation_shift.detach().double().numpy(), layer.groups)
    moved = (model.grouped_norm.running_mean - before).numpy()
    np.testing.assert_allclose(moved, -taken, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("running", [True, False], ids=["running statistics", "none kept"])
def test_the_outputs_of_unpadded_convolutions_stay_the_same(running: bool) -> None:
    model = make_chain(running=running)
    with torch.no_grad():
        other = images(seed=7)
        expected = copy.deepcopy(model).double()(other["pixel_values"].double())
        binarize(model, FULL_PRECISION)
        for seed in (1, 2):  # a second calibration starts from the shifts of the first
            calibrate(model, images(seed))
            found = copy.deepcopy(model).double()(other["pixel_values"].double())
            # What is made up for is counted in float32.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert model.plain.activation_shift.abs().max() > 0.1


def test_the_outputs_of_a_mobilenet_stay_the_same(tiny_vision_model: Factory, tiny_images: Factory) -> None:
    # Its signed inputs are those of 1x1 convolutions; all that is padded is unsigned, or not binarized.
    model = tiny_vision_model("mobilenet-v2")
    batch, other = ({"pixel_values": tiny_images(model, 4, seed=seed)} for seed in (1, 2))
    expected = model(**other).logits
    calibrate(binarize(model, FULL_PRECISION), batch)
    torch.testing.assert_close(model(**other).logits, expected, rtol=1e-3, atol=1e-4)
    shifts = [layer.activation_shift for layer in binary_layers(model).values() if not layer.unsigned]
    assert len(shifts) == 17 and all(shift.abs().max() > 0.01 for shift in shifts)


def test_padding_stands_for_the_mean_of_its_channel() -> None:
    model = make_chain(padding=2)
    plain = copy.deepcopy(model)
    calibrate(binarize(model, FULL_PRECISION), images())
    shift = model.plain.activation_shift.detach().double().numpy()
    with torch.no_grad():
        x = torch.tanh(model.stem(images(seed=7)["pixel_values"]))
        found = model.plain_norm(model.plain(x)).numpy()
    around = np.broadcast_to(shift[:, None, None], (5, 6, x.shape[2] + 4, x.shape[3] + 4)).copy()
    around[:, :, 2:-2, 2:-2] = x.double().numpy()
    unpadded = nn.Conv2d(6, 8, 3, stride=2, bias=False)
    expected = convolve(unpadded, around, plain.plain.weight.detach().double().numpy())
    np.testing.assert_allclose(found, batch_norm(plain.plain_norm, expected), rtol=1e-4, atol=1e-5)


def test_a_bias_less_layer_without_norm_keeps_the_shift_it_has() -> None:
    model = binarize(make_chain(), FULL_PRECISION)
    learned = torch.linspace(-0.3, 0.3, 6)
    model.lonely.activation_shift.data.copy_(learned)
    seen = inputs_in_training(model, images())["lonely"]
    calibrate(model, images())
    assert torch.equal(model.lonely.activation_shift, learned)
    expected = np.abs(seen - learned.double().numpy()[:, None, None]).mean()
    assert model.lonely.activation_scale.item() == pytest.approx(expected, rel=1e-4)


def test_it_leaves_no_trace_where_the_forward_fails() -> None:
    model = binarize(make_chain(), FULL_PRECISION).train()
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        calibrate(model, {"pixel_values": torch.randn(2, 4, 20, 17, generator=torch.Generator().manual_seed(0))})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_only_leaves_everything_as_it_was() -> None:
    model = binarize(make_chain(), BinarizationConfig(activations=False))
    before = copy.deepcopy(model.state_dict())
    calibrate(model, images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("vision", ["vit", "swin", "convnext", "regnet-y"])
def test_every_layer_of_other_architectures_is_calibrated(
    vision: str, tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    model = tiny_vision_model(vision)
    batch = {"pixel_values": tiny_images(model, 4)}
    expected = model(**batch).logits
    seen = inputs_in_training(model, batch)
    calibrate(binarize(model, FULL_PRECISION), batch)
    for name, layer in binary_layers(model).items():
        axes = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(seen[name].ndim - 1))
        x = seen[name]
        # Swin's reductions have no bias, and no batch norm behind them.
        shift = 0.0 if layer.bias is None else x.mean(axis=axes, keepdims=True)
        scale = lloyd_level(x) if layer.unsigned else np.abs(x - shift).mean()
        assert layer.activation_scale.item() == pytest.approx(scale, rel=1e-3), name
        assert layer.calibrated
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_norm_that_is_not_alone_makes_up_for_nothing() -> None:
    """What else takes the layer's output would miss what the shift took from it: the layer keeps its shift."""

    class PreActivation(Chain):
        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.plain(torch.tanh(self.stem(pixel_values)))
            return x + self.plain_norm(x)

    model = binarize(PreActivation().eval(), FULL_PRECISION)
    before = copy.deepcopy(model.plain_norm)
    calibrate(model, {"pixel_values": torch.randn(4, 3, 16, 16)})
    assert not model.plain.activation_shift.any()
    assert torch.equal(model.plain_norm.running_mean, before.running_mean)


def test_an_image_of_one_pixel_is_refused(tiny_vision_model: Factory) -> None:
    model = binarize(tiny_vision_model("resnet-18"), BinarizationConfig())
    with pytest.raises(
        ValueError, match="calibrate takes the statistics of the batch, .* give it more images, or larger"
    ):
        calibrate(model, {"pixel_values": torch.randn(1, 3, 8, 8)})
