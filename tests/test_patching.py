"""`binarize` and `calibrate` on every architecture."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy_latent import lloyd_level
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_stompp import BinarizationConfig, binarize, calibrate
from hf_stompp.layers import BinaryLinear
from hf_stompp.patching import binary_layers, frozen_fraction

ModelFactory = Callable[..., PreTrainedModel]
BatchFactory = Callable[..., dict[str, Tensor]]

FULL_PRECISION = BinarizationConfig(clip=None)
"""Nothing is frozen before training, and nothing clipped: the unmodified model."""


def set_all_frozen(model: PreTrainedModel, fraction: float, step: int = 1) -> None:
    for layer in binary_layers(model).values():
        layer.set_frozen(fraction, step)


def recorded_inputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The input of every linear in its last call, one row a token that is not padding, in float64."""
    found: dict[str, np.ndarray] = {}
    real = batch["attention_mask"].bool()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(layer: nn.Linear, args: tuple[Tensor], name: str = name) -> None:
                x = args[0].detach()
                x = x[real] if x.shape[:-1] == real.shape else x
                found[name] = x.double().numpy().reshape(-1, layer.in_features)

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


# --- binarize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "dtype"),
    [
        ("SequenceClassification", torch.float32),
        ("SequenceClassification", torch.bfloat16),
        ("MaskedLM", torch.float32),
    ],
    ids=["classifier", "classifier-bfloat16", "masked"],
)
def test_soft_and_unclipped_is_the_unmodified_model_bit_for_bit(
    architecture: str, head: str, dtype: torch.dtype, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    model = tiny_model(architecture, head).to(dtype)
    expected = model(**tiny_batch()).logits
    binarize(model, FULL_PRECISION)
    assert torch.equal(model(**tiny_batch()).logits, expected)
    set_all_frozen(model, 1.0)
    assert not torch.equal(model(**tiny_batch()).logits, expected)


def test_gradients_of_the_unmodified_model_bit_for_bit(
    architecture: str, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    model = tiny_model(architecture)
    twin = binarize(copy.deepcopy(model), FULL_PRECISION)
    for each in (model, twin):
        each(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    found = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(found[name].grad, parameter.grad), name


def test_patching_keeps_the_parameters_and_records_what_was_done(architecture: str, tiny_model: ModelFactory) -> None:
    model, config = tiny_model(architecture).train(), BinarizationConfig()
    before = dict(model.named_parameters())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    random_state = torch.get_rng_state()
    assert binarize(model, config) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name.rpartition(".")[2] for name in set(after) - set(before)}
    assert added == {"activation_scale", "activation_shift"}
    assert all(module.training for module in model.modules())
    layers = binary_layers(model)
    assert set(layers) < linears
    assert [layer.unit for layer in layers.values()] == sorted(layer.unit for layer in layers.values())
    assert frozen_fraction(model) == 0.0
    recorded = model.config.quantization_config
    assert recorded.modules == {
        layer.key: {"unit": layer.unit, "levels": "unsigned" if layer.unsigned else "signed"}
        for layer in layers.values()
    }
    assert all(layer.config is recorded for layer in layers.values())
    assert config == BinarizationConfig(), "the caller's config is not changed"


def test_without_binary_activations_there_are_no_levels(tiny_model: ModelFactory) -> None:
    model = binarize(tiny_model("bert"), BinarizationConfig(activations=False))
    assert {entry["levels"] for entry in model.config.quantization_config.modules.values()} == {None}
    assert not any("activation" in name for name, _ in model.named_parameters())


def test_masks_are_keyed_alike_with_and_without_a_head(tiny_model: ModelFactory) -> None:
    models = [binarize(tiny_model("bert", head)) for head in ("", "SequenceClassification", "MaskedLM")]
    for model in models:
        set_all_frozen(model, 0.5)
    masks = [[layer.weight_mask for layer in binary_layers(model).values()] for model in models]
    assert len(masks[0]) == 12
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*masks, strict=True))
    assert not torch.equal(masks[0][0], masks[0][1])


def test_the_frozen_fraction_counts_weights(tiny_model: ModelFactory) -> None:
    model = binarize(tiny_model("bert"))
    layers = list(binary_layers(model).values())
    for i, layer in enumerate(layers):
        layer.set_frozen(i / 16, 1)
    sizes = np.array([layer.weight.numel() for layer in layers])
    assert frozen_fraction(model) == pytest.approx(np.average(np.arange(12) / 16, weights=sizes))


def test_replace_gelu_gives_the_model_that_was_configured_with_relu(
    architecture: str, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    field = "activation" if architecture == "distilbert" else "hidden_act"
    relu = tiny_model(architecture, "MaskedLM", **{field: "relu"})
    gelu = tiny_model(architecture, "MaskedLM")
    # The head's activation is not part of the encoder, and stays.
    head = {name: m for name, m in gelu.named_modules() if "GELU" in type(m).__name__ and "layer" not in name}
    for name, module in head.items():
        relu.set_submodule(name, module)
    different = gelu(**tiny_batch()).logits
    binarize(gelu, BinarizationConfig(clip=None, replace_gelu=True))
    assert torch.equal(gelu(**tiny_batch()).logits, relu(**tiny_batch()).logits)
    assert not torch.equal(gelu(**tiny_batch()).logits, different)


def test_replace_gelu_needs_a_gelu_before_a_binarized_layer(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert")
    config = BinarizationConfig(replace_gelu=True, exclude=["encoder.layer.?.output.dense"])
    with pytest.raises(ValueError, match=r"replace_gelu is set, but no activation module of BertForSequence"):
        binarize(model, config)
    assert not binary_layers(model)


def test_binarizing_twice_is_refused(tiny_model: ModelFactory) -> None:
    model = binarize(tiny_model("bert"))
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is binarized already"):
        binarize(model)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), "bert", None], ids=str)
def test_only_a_pretrained_model_is_binarized(model: Any) -> None:
    with pytest.raises(TypeError, match=rf"PreTrainedModel, not a {type(model).__name__}"):
        binarize(model)


def test_a_refused_model_is_left_as_it_was(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="nothing_like_this"):
        binarize(model, BinarizationConfig(exclude=["nothing_like_this"]))
    assert not binary_layers(model)
    assert getattr(model.config, "quantization_config", None) is None


# --- calibrate -----------------------------------------------------------------------------------------------------


def check_scales(layers: dict[str, BinaryLinear], seen: dict[str, np.ndarray], shifted: bool) -> None:
    for name, layer in layers.items():
        x, scale = seen[name], layer.activation_scale.item()
        if layer.unsigned:
            assert scale == pytest.approx(lloyd_level(x), rel=1e-4), name
            continue
        shift = x.mean(axis=0) if shifted else np.zeros(x.shape[1])
        assert scale == pytest.approx(np.abs(x - shift).mean(), rel=1e-4), name
        if shifted:
            np.testing.assert_allclose(layer.activation_shift.detach().numpy(), shift, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shifted", [False, True], ids=["centred", "shifted"])
def test_scales_and_shifts_equal_numpy(
    architecture: str, shifted: bool, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    model = tiny_model(architecture)
    seen = recorded_inputs(model, tiny_batch())
    binarize(model, BinarizationConfig(clip=None, learn_activation_shift=shifted))
    calibrate(model, tiny_batch())
    layers = binary_layers(model)
    check_scales(layers, seen, shifted)
    assert len({layer.activation_scale.item() for layer in layers.values()}) > 3


def test_calibration_leaves_the_output_as_it_was(
    architecture: str, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    # With inputs off zero, so that the shifts, which go into the biases, are large.
    model = tiny_model(architecture)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(0))
    other = tiny_batch(seed=1)
    expected = model(**other).logits
    binarize(model, FULL_PRECISION)
    biases = {name: layer.bias.detach().clone() for name, layer in binary_layers(model).items()}
    for seed in (2, 3):  # a second calibration starts from the shifts of the first
        calibrate(model, tiny_batch(seed=seed))
        torch.testing.assert_close(model(**other).logits, expected, rtol=1e-4, atol=1e-5)
    signed = {name: layer for name, layer in binary_layers(model).items() if not layer.unsigned}
    assert all(layer.activation_shift.abs().max() > 0.01 for layer in signed.values())
    assert sum(not torch.allclose(layer.bias, biases[name]) for name, layer in signed.items()) > 3


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "electra", "deberta-v2"])
def test_each_layer_sees_what_calibrated_frozen_layers_give(
    architecture: str, fraction: float, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    model = binarize(tiny_model(architecture))
    set_all_frozen(model, fraction)
    calibrate(model, tiny_batch())
    check_scales(binary_layers(model), recorded_inputs(model, tiny_batch()), shifted=True)


def test_the_unsigned_level_is_the_least_squares_level(tiny_model: ModelFactory, tiny_batch: BatchFactory) -> None:
    model = tiny_model("bert", hidden_act="relu", initializer_range=0.3)
    seen = recorded_inputs(model, tiny_batch())
    binarize(model, FULL_PRECISION)
    calibrate(model, tiny_batch())

    def error(x: np.ndarray, level: float) -> float:
        return np.square(x - np.where(x >= level / 2, level, 0)).mean()

    unsigned = {name: layer for name, layer in binary_layers(model).items() if layer.unsigned}
    assert len(unsigned) == 2
    for name, layer in unsigned.items():
        x = seen[name]
        best = min(error(x, level) for level in np.linspace(0, x.max(), 2000))
        assert error(x, layer.activation_scale.item()) <= best * (1 + 1e-3)


def test_a_layer_without_bias_keeps_its_inputs_unshifted(tiny_model: ModelFactory, tiny_batch: BatchFactory) -> None:
    model = tiny_model("bert")
    name = "bert.encoder.layer.1.intermediate.dense"
    model.get_submodule(name).bias = None
    expected, seen = model(**tiny_batch()).logits, recorded_inputs(model, tiny_batch())[name]
    binarize(model, FULL_PRECISION)
    calibrate(model, tiny_batch())
    layer = binary_layers(model)[name]
    assert not layer.activation_shift.any()
    assert layer.activation_scale.item() == pytest.approx(np.abs(seen).mean(), rel=1e-4)
    torch.testing.assert_close(model(**tiny_batch()).logits, expected)


def test_inputs_of_zeros_get_the_scale_one(tiny_model: ModelFactory, tiny_batch: BatchFactory) -> None:
    model = tiny_model("bert", hidden_act="relu")
    dense = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    nn.init.constant_(dense.bias, -100.0)  # the ReLU after it lets nothing through
    binarize(model)
    calibrate(model, tiny_batch())
    assert binary_layers(model)["bert.encoder.layer.0.output.dense"].activation_scale.item() == 1.0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_calibration_leaves_mode_hooks_and_generator(
    training: bool, tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    model = binarize(tiny_model("bert")).train(training)
    random_state = torch.get_rng_state()
    calibrate(model, tiny_batch() | {"labels": torch.tensor([0, 1, 0])})
    assert torch.equal(torch.get_rng_state(), random_state), "dropout is off"
    with pytest.raises(ValueError, match="input_ids"):
        calibrate(model, {})
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_binary_weights_only_has_nothing_to_calibrate(
    tiny_model: ModelFactory, tiny_batch: BatchFactory
) -> None:
    model = binarize(tiny_model("bert"), BinarizationConfig(activations=False))
    before = copy.deepcopy(model.state_dict())
    calibrate(model, tiny_batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
