"""What `replace_relu` and `bireal_shortcuts` change in a model, and that a loaded model has it again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_convolution import batch_norm, convolve
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from hf_stompp import BinarizationConfig, binarize, calibrate, pack, summary
from hf_stompp.patching import binary_layers
from hf_stompp.rewiring import BiRealBasicLayer, BiRealBottleNeckLayer
from hf_stompp.selection import select

Factory = Callable[..., Any]
SMALL: dict[str, dict[str, Any]] = {
    "resnet-18": {"depths": [1, 2]},
    "resnet-50": {"depths": [1, 2]},
    "mobilenet-v2": {},
    "regnet-x": {"depths": [1, 1]},
    "regnet-y": {"depths": [1, 1]},
}


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    return model


def owned(model: PreTrainedModel) -> PreTrainedModel:
    """A loaded model whose tensors are no longer at the addresses of a mapped file, which may sum in another order."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def activations(model: nn.Module) -> dict[str, str]:
    """Name → class of what is an activation in the model's class."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name.endswith("activation") or type(module) in (nn.ReLU, nn.ReLU6)
    }


# --- replace_relu --------------------------------------------------------------------------------------------------


def feeding(vision: str) -> list[str]:
    """The ReLUs whose values are the input of a binarized layer."""
    if vision == "mobilenet-v2":  # the others are before depthwise convolutions; a block's output is linear
        return ["mobilenet_v2.conv_stem.conv_3x3.activation"] + [
            f"mobilenet_v2.layer.{i}.conv_3x3.activation" for i in range(16)
        ]
    base = vision.split("-")[0]
    # Before the gate of a RegNet Y there is a ReLU whose values are gated before they reach a layer.
    inner = {"resnet-18": [0], "resnet-50": [0, 1], "regnet-x": [0, 1], "regnet-y": [0]}[vision]
    blocks = [
        f"encoder.stages.{s}.layers.{i}" for s, depth in enumerate(SMALL[vision]["depths"]) for i in range(depth)
    ]
    names = ["embedder.embedder.activation"]
    for block in blocks:
        names += [f"{block}.layer.{i}.activation" for i in inner]
        names += [f"{block}.activation"] if block != blocks[-1] else []  # the last one feeds the head
    return [f"{base}.{name}" for name in names]


@pytest.mark.parametrize("vision", SMALL)
def test_replace_relu_drops_exactly_the_relus_that_feed_binarized_layers(
    vision: str, tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    model = tiny_vision_model(vision, **SMALL[vision])
    dropped, before = feeding(vision), activations(model)
    assert all(before[name] in ("ReLU", "ReLU6") for name in dropped)
    twin = copy.deepcopy(model)
    plain = twin(tiny_images(model)).logits
    for name in dropped:
        twin.set_submodule(name, nn.Identity())
    binarize(model, BinarizationConfig(replace_relu=True, clip=None))
    assert activations(model) == before | dict.fromkeys(dropped, "Identity")
    found = model(tiny_images(model)).logits
    assert torch.equal(found, twin(tiny_images(model)).logits) and not torch.equal(found, plain)
    signed = [row.levels == "{-s,+s}" for row in summary(model).rows if row.unit is not None]
    layers = binary_layers(model)
    assert signed == [not layer.unsigned for layer in layers.values()]
    # The gate's output is the only one that is still half-rectified.
    assert {name for name, layer in layers.items() if layer.unsigned} == (
        {f"regnet.encoder.stages.{s}.layers.0.layer.3.convolution" for s in (0, 1)} if vision == "regnet-y" else set()
    )
    assert all((layer.activation_shift is None) == layer.unsigned for layer in layers.values())


def test_a_relu_before_a_layer_that_is_kept_stays(tiny_vision_model: Factory) -> None:
    model, second = tiny_vision_model("resnet-18", depths=[1, 1]), "encoder.stages.0.layers.0.layer.1.convolution"
    binarize(model, BinarizationConfig(replace_relu=True, exclude=[second]))
    kinds = activations(model)
    assert kinds["resnet.encoder.stages.0.layers.0.layer.0.activation"] == "ReLU"
    assert kinds["resnet.encoder.stages.1.layers.0.layer.0.activation"] == "Identity"


def test_depthwise_layers_that_are_binarized_lose_their_relus_too(tiny_vision_model: Factory) -> None:
    model = binarize(
        tiny_vision_model("mobilenet-v1"), BinarizationConfig(replace_relu=True, include=["layer.*.convolution"])
    )
    stay = [name for name, kind in activations(model).items() if kind == "ReLU6"]
    assert stay == ["mobilenet_v1.layer.25.activation"]


def test_other_activations_stay_and_both_flags_drop_all(tiny_vision_model: Factory) -> None:
    # Inside of a block ResNet has ReLUs whatever its config says.
    overrides: dict[str, Any] = {"depths": [1, 1], "hidden_act": "gelu"}
    relu = binarize(tiny_vision_model("resnet-18", **overrides), BinarizationConfig(replace_relu=True))
    inner = {f"resnet.encoder.stages.{s}.layers.0.layer.0.activation" for s in (0, 1)}
    kinds = activations(relu)
    assert {name for name, kind in kinds.items() if kind == "Identity" and "layer.1" not in name} == inner
    assert sum("GELU" in kind for kind in kinds.values()) == 3
    both = binarize(
        tiny_vision_model("resnet-18", **overrides), BinarizationConfig(replace_relu=True, replace_gelu=True)
    )
    kinds = activations(both)
    assert [name for name, kind in kinds.items() if kind != "Identity"] == [
        "resnet.encoder.stages.1.layers.0.activation"
    ]
    assert "GELU" in kinds["resnet.encoder.stages.1.layers.0.activation"]


@pytest.mark.parametrize(
    ("field", "vision"),
    [
        ("replace_relu", "vit"),
        ("replace_relu", "swin"),
        ("replace_relu", "convnext"),
        ("replace_gelu", "resnet-18"),
        ("replace_gelu", "mobilenet-v2"),
    ],
    ids=str,
)
def test_a_flag_without_an_activation_of_its_kind_is_refused_by_name(
    field: str, vision: str, tiny_vision_model: Factory
) -> None:
    model = tiny_vision_model(vision)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"{field} is set, but no activation module of {type(model).__name__}"):
        binarize(model, BinarizationConfig(**{field: True}))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize(
    ("vision", "flags"),
    [
        ("resnet-18", {"replace_relu": True}),
        ("resnet-50", {"bireal_shortcuts": True}),
        ("resnet-18", {"bireal_shortcuts": True, "replace_relu": True}),
    ],
    ids=str,
)
def test_it_is_there_again_in_loaded_latent_and_packed_models(
    vision: str, flags: dict[str, bool], tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path
) -> None:
    latent = binarize(tiny_vision_model(vision, **SMALL[vision]), BinarizationConfig(**flags))
    calibrate(latent, {"pixel_values": tiny_images(latent, 4, seed=1)})
    images = tiny_images(latent, 2, height=41, width=50)
    expected = freeze(latent)(images).logits
    with torch.no_grad():
        for name, model in (("latent", latent), ("packed", pack(latent))):
            model.save_pretrained(tmp_path / name)
            loaded = owned(AutoModelForImageClassification.from_pretrained(tmp_path / name))
            assert torch.equal(model(images).logits, expected)
            assert torch.equal(loaded.eval()(images).logits, expected)
            assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
        other = binarize(tiny_vision_model(vision, **SMALL[vision]), BinarizationConfig())
        assert not torch.allclose(freeze(other)(images).logits, expected)


# --- bireal_shortcuts ------------------------------------------------------------------------------------------------


def fitted(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """`x` with the pixels and channels of `like`: the average of each 2x2 pixels, copies or averages of channels."""
    if x.shape[2:] != like.shape[2:]:
        rows = [x[:, :, i : i + 2].copy() for i in range(0, x.shape[2], 2)]
        x = np.stack(
            [
                np.stack([row[..., j : j + 2].mean(axis=(2, 3)) for j in range(0, x.shape[3], 2)], axis=-1)
                for row in rows
            ],
            axis=2,
        )
    have, wanted = x.shape[1], like.shape[1]
    if wanted > have:
        return np.stack([x[:, channel % have] for channel in range(wanted)], axis=1)
    share = have // wanted
    return np.stack([x[:, i * share : (i + 1) * share].mean(axis=1) for i in range(wanted)], axis=1)


def bireal_block(block: Any, x: np.ndarray) -> np.ndarray:
    """A block with ReLUs and a shortcut around each convolution, as Bi-Real Net has them; the projection is around the
    first of a basic block, and around all of a bottleneck."""

    def conv(i: int, x: np.ndarray) -> np.ndarray:
        layer = block.layer[i]
        y = convolve(layer.convolution, x, layer.convolution.weight.detach().double().numpy())
        return batch_norm(layer.normalization, y)

    own = x
    if not isinstance(block.shortcut, nn.Identity):
        kernel = block.shortcut.convolution
        own = batch_norm(block.shortcut.normalization, convolve(kernel, x, kernel.weight.detach().double().numpy()))
    if len(block.layer) == 2:
        first = np.maximum(conv(0, x) + own, 0)
        return np.maximum(conv(1, first) + first, 0)
    first = conv(0, x)
    first = np.maximum(first + fitted(x, first), 0)
    second = conv(1, first)
    second = np.maximum(second + fitted(first, second), 0)
    return np.maximum(conv(2, second) + own, 0)


BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet-18", {"depths": [2, 2]}),
    "basic, downsampling at once": ("resnet-18", {"depths": [1, 1], "downsample_in_first_stage": True}),
    "bottleneck as wide as its input": ("resnet-50", {"depths": [2, 2]}),
    "narrower bottleneck": ("resnet-50", {"depths": [1, 1], "embedding_size": 8}),
    "wider bottleneck": ("resnet-50", {"depths": [1, 1], "embedding_size": 4, "hidden_sizes": [32, 64]}),
    "stride in the first convolution": ("resnet-50", {"depths": [1, 1], "downsample_in_bottleneck": True}),
}


@pytest.mark.parametrize(("vision", "overrides"), BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_compute_the_formula(
    vision: str, overrides: dict[str, Any], tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    model = tiny_vision_model(vision, **overrides)
    images = tiny_images(model, 2, height=37, width=48)
    plain = model(images).logits
    binarize(model, BinarizationConfig(clip=None, bireal_shortcuts=True))
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    blocks = {name: module for name, module in model.named_modules() if hasattr(module, "shortcut")}
    for name, block in blocks.items():
        block.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0].double().numpy(), out.double().numpy())})
        )
    with torch.no_grad():
        assert not torch.allclose(model(images).logits, plain)
    assert len(seen) == len(blocks) == sum(model.config.depths)
    for name, (x, y) in seen.items():
        np.testing.assert_allclose(y, bireal_block(blocks[name], x), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("vision", ["resnet-18", "resnet-50"])
def test_names_parameters_and_classes_stay(vision: str, tiny_vision_model: Factory) -> None:
    model, other = tiny_vision_model(vision), binarize(tiny_vision_model(vision))
    before, blocks = dict(model.named_parameters()), [m for m in model.modules() if hasattr(m, "shortcut")]
    binarize(model, BinarizationConfig(bireal_shortcuts=True))
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert model.state_dict().keys() == other.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]
    assert [m for m in model.modules() if hasattr(m, "shortcut")] == blocks
    kind, bireal = {
        "resnet-18": (ResNetBasicLayer, BiRealBasicLayer),
        "resnet-50": (ResNetBottleNeckLayer, BiRealBottleNeckLayer),
    }[vision]
    assert all(type(block) is bireal and isinstance(block, kind) for block in blocks)


@pytest.mark.parametrize("vision", ["resnet-18", "resnet-50"])
def test_the_same_layers_are_binarized_with_and_without(vision: str, tiny_vision_model: Factory) -> None:
    plans = select(tiny_vision_model(vision), BinarizationConfig())
    model = binarize(tiny_vision_model(vision), BinarizationConfig(bireal_shortcuts=True))
    assert binary_layers(model).keys() == {plan.name for plan in plans if not plan.skipped}
    rows = {row.name: (row.role, row.unit, row.levels) for row in summary(model).rows[:-1]}
    levels = {True: "{0,+s}", False: "{-s,+s}"}
    for plan in plans:
        assert rows[plan.name] == (plan.role, plan.unit, "" if plan.skipped else levels[plan.unsigned])


def test_without_the_flag_a_resnet_is_what_it_was(tiny_vision_model: Factory, tiny_images: Factory) -> None:
    forwards = ResNetBasicLayer.forward, ResNetBottleNeckLayer.forward
    binarize(tiny_vision_model("resnet-18"), BinarizationConfig(bireal_shortcuts=True))
    model = tiny_vision_model("resnet-18")
    expected = model(tiny_images(model)).logits
    binarize(model, BinarizationConfig(clip=None))
    assert (ResNetBasicLayer.forward, ResNetBottleNeckLayer.forward) == forwards
    assert {type(module) for module in model.modules() if hasattr(module, "shortcut")} == {ResNetBasicLayer}
    assert torch.equal(model(tiny_images(model)).logits, expected)


def test_a_pretrained_checkpoint_loads(tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path) -> None:
    tiny_vision_model("resnet-18").save_pretrained(tmp_path)
    config = BinarizationConfig(bireal_shortcuts=True, replace_relu=True)
    model, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=config, output_loading_info=True
    )
    assert not any(info.values())
    expected = binarize(tiny_vision_model("resnet-18"), config)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    with torch.no_grad():
        images = tiny_images(expected)
        assert torch.equal(owned(model)(images).logits, expected(images).logits)


@pytest.mark.parametrize("vision", ["mobilenet-v2", "regnet-x", "vit"])
def test_shortcuts_in_a_model_without_resnet_blocks_are_refused_by_name(
    vision: str, tiny_vision_model: Factory
) -> None:
    model = tiny_vision_model(vision)
    kinds = "ResNetBasicLayer or ResNetBottleNeckLayer"
    with pytest.raises(ValueError, match=rf"bireal_shortcuts is set, but {type(model).__name__} has no {kinds}"):
        binarize(model, BinarizationConfig(bireal_shortcuts=True))


def test_a_model_that_is_refused_is_left_as_it_was(tiny_vision_model: Factory) -> None:
    model = tiny_vision_model("regnet-x")
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="bireal_shortcuts is set"):
        binarize(model, BinarizationConfig(replace_relu=True, bireal_shortcuts=True))
    assert [type(module) for module in model.modules()] == before


def test_a_model_with_shortcuts_trains(tiny_vision_model: Factory, tiny_images: Factory) -> None:
    model = binarize(
        tiny_vision_model("resnet-50", trained=False),
        BinarizationConfig(bireal_shortcuts=True, replace_relu=True, surrogate="none"),
    )
    images, labels = tiny_images(model, 4), torch.tensor([0, 1, 1, 0])
    calibrate(model, {"pixel_values": images})
    for layer in binary_layers(model).values():
        layer.set_frozen(0.5, step=1)
    model.train()(pixel_values=images, labels=labels).loss.backward()
    for name, layer in binary_layers(model).items():
        gradient = layer.weight.grad
        assert gradient.isfinite().all() and gradient.any() and not gradient[layer.weight_mask].any(), name
    # Shortcuts lead around frozen activations, so that the first layer learns even if all are frozen.
    freeze(model).zero_grad()
    model(pixel_values=images, labels=labels).loss.backward()
    assert model.resnet.embedder.embedder.convolution.weight.grad.any()
