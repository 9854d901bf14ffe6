"""Image classifiers of every architecture: what is binarized in them, and that all of it makes the round trip."""

import copy
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VISION_CONFIGS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ResNetConfig, ResNetForImageClassification

from hf_stompp import BinarizationConfig, binarize, calibrate, kernels, pack, summary, unpack
from hf_stompp.fusion import fuse
from hf_stompp.layers import BinaryConv2d, BinaryInput, BinaryLayer, PackedConv2d
from hf_stompp.patching import binary_layers, packed_layers
from hf_stompp.selection import LayerPlan, select

pytestmark = pytest.mark.usefixtures("reference_kernels")  # which give what latent layers give, bit for bit

Factory = Callable[..., Any]


@pytest.fixture(params=list(VISION_CONFIGS))
def vision(request: pytest.FixtureRequest) -> str:
    """Each architecture by name."""
    return request.param


def freeze(model: PreTrainedModel, fraction: float = 1.0, step: int = 1) -> PreTrainedModel:
    for layer in binary_layers(model).values():
        layer.set_frozen(fraction, step)
    return model


def owned(model: PreTrainedModel) -> PreTrainedModel:
    """A loaded model whose tensors are no longer at the addresses of a mapped file, which may sum in another order."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


# --- what is binarized -----------------------------------------------------------------------------------------------

UNSIGNED, SIGNED = "{0,+s}", "{-s,+s}"


def resnet(depths: list[int], convolutions: int) -> list[tuple[str, str]]:
    """A block's shortcut comes last; a basic one has none in the first stage, whose width is the stem's."""
    rows = [("embedder.embedder.convolution", "stem")]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            block = f"encoder.stages.{stage}.layers.{i}"
            rows += [(f"{block}.layer.{j}.convolution", UNSIGNED) for j in range(convolutions)]
            if i == 0 and (stage > 0 or convolutions == 3):
                rows.append((f"{block}.shortcut.convolution", "shortcut"))
    return rows


def regnet(depths: list[int], gates: bool) -> list[tuple[str, str]]:
    rows = [("embedder.embedder.convolution", "stem")]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            block = f"encoder.stages.{stage}.layers.{i}"
            rows += [(f"{block}.layer.{j}.convolution", UNSIGNED) for j in (0, 1)]
            if gates:
                rows += [(f"{block}.layer.2.attention.{j}", "gate") for j in (0, 2)]
            rows.append((f"{block}.layer.{3 if gates else 2}.convolution", UNSIGNED))
            if i == 0:
                rows.append((f"{block}.shortcut.convolution", "shortcut"))
    return rows


def mobilenet_v1() -> list[tuple[str, str]]:
    layers = [(f"layer.{i}.convolution", UNSIGNED if i % 2 else "depthwise") for i in range(26)]
    return [("conv_stem.convolution", "stem"), *layers]


def mobilenet_v2() -> list[tuple[str, str]]:
    """Nothing is rectified after a block: its bottleneck is linear."""
    rows = [
        ("conv_stem.first_conv.convolution", "stem"),
        ("conv_stem.conv_3x3.convolution", "depthwise"),
        ("conv_stem.reduce_1x1.convolution", UNSIGNED),
    ]
    for i in range(16):
        rows += [
            (f"layer.{i}.expand_1x1.convolution", SIGNED),
            (f"layer.{i}.conv_3x3.convolution", "depthwise"),
            (f"layer.{i}.reduce_1x1.convolution", UNSIGNED),
        ]
    return [*rows, ("conv_1x1.convolution", SIGNED)]


def convnext(depths: list[int]) -> list[tuple[str, str]]:
    rows = [("embeddings.patch_embeddings", "stem")]
    for stage, depth in enumerate(depths):
        if stage:
            rows.append((f"encoder.stages.{stage}.downsampling_layer.1", SIGNED))
        for i in range(depth):
            block = f"encoder.stages.{stage}.layers.{i}"
            rows += [(f"{block}.dwconv", "depthwise"), (f"{block}.pwconv1", SIGNED), (f"{block}.pwconv2", UNSIGNED)]
    return rows


def attention_block(block: str) -> list[tuple[str, str]]:
    names = [f"attention.{name}_proj" for name in "qkvo"]
    return [(f"{block}.{name}", SIGNED) for name in (*names, "mlp.fc1")] + [(f"{block}.mlp.fc2", UNSIGNED)]


def vit() -> list[tuple[str, str]]:
    blocks = [row for i in range(2) for row in attention_block(f"layers.{i}")]
    return [("embeddings.patch_embeddings.projection", "stem"), *blocks]


def swin(depths: list[int]) -> list[tuple[str, str]]:
    rows = [("embeddings.patch_embeddings.projection", "stem")]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            rows += attention_block(f"encoder.layers.{stage}.blocks.{i}")
        if stage < len(depths) - 1:
            rows.append((f"encoder.layers.{stage}.downsample.reduction", SIGNED))
    return rows


LAYERS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "resnet-18": ("resnet", resnet([2, 2], 2), "classifier.1"),
    "resnet-34": ("resnet", resnet([3, 4, 6, 3], 2), "classifier.1"),
    "resnet-50": ("resnet", resnet([2, 2], 3), "classifier.1"),
    "mobilenet-v1": ("mobilenet_v1", mobilenet_v1(), "classifier"),
    "mobilenet-v2": ("mobilenet_v2", mobilenet_v2(), "classifier"),
    "regnet-x": ("regnet", regnet([1, 2], gates=False), "classifier.1"),
    "regnet-y": ("regnet", regnet([1, 2], gates=True), "classifier.1"),
    "convnext": ("convnext", convnext([1, 2]), "classifier"),
    "vit": ("vit", vit(), "classifier"),
    "deit": ("deit", vit(), "classifier"),
    "swin": ("swin", swin([1, 2]), "classifier"),
}
"""Architecture → name of the base model; its layers in the order of their execution, with the levels of their inputs
if they are binarized and their role if not; and the head."""


def found(plans: list[LayerPlan]) -> list[tuple[str, str]]:
    """The layers of the base model as in the table above, but for what was included."""
    return [
        (plan.key, plan.role if plan.skipped else UNSIGNED if plan.unsigned else SIGNED)
        for plan in plans
        if plan.role != "head"
    ]


@dataclass
class Selected:
    """A model by the name of its architecture, which no test may change, and what is selected in it."""

    vision: str
    model: PreTrainedModel
    plans: list[LayerPlan]


@pytest.fixture(scope="module", params=list(VISION_CONFIGS))
def selected(request: pytest.FixtureRequest, tiny_vision_model: Factory) -> Selected:
    """Each architecture."""
    model = tiny_vision_model(request.param)
    return Selected(request.param, model, select(model, BinarizationConfig()))


def test_roles_and_levels_in_the_order_of_execution(selected: Selected) -> None:
    base, rows, head = LAYERS[selected.vision]
    plans = selected.plans
    assert found(plans) == rows
    assert [plan.name for plan in plans] == [f"{base}.{name}" for name, _ in rows] + [head]
    assert plans[-1].role == "head"
    assert all(bool(plan.skipped) == (plan.role != "encoder") for plan in plans)


def test_units_are_layers_that_see_the_same_input(selected: Selected) -> None:
    expected: list[list[str]] = []
    for name, kind in LAYERS[selected.vision][1]:
        if kind not in (UNSIGNED, SIGNED):
            continue
        if name.endswith(("k_proj", "v_proj")):
            expected[-1].append(name)
        else:
            expected.append([name])
    units: dict[int, list[str]] = {}
    for plan in selected.plans:
        if plan.unit is not None:
            units.setdefault(plan.unit, []).append(plan.key)
    assert list(units) == list(range(len(expected)))
    assert list(units.values()) == expected


def test_order_and_levels_are_those_of_a_real_forward(selected: Selected, tiny_images: Factory) -> None:
    lowest: dict[str, float] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: lowest.update({name: args[0].min().item()}))
        for name, module in selected.model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        selected.model(pixel_values=tiny_images(selected.model, 4))
    for handle in handles:
        handle.remove()
    assert [plan.name for plan in selected.plans] == list(lowest)
    # What GELU gives is above -0.17; other inputs have values of both signs.
    for plan in selected.plans:
        assert plan.skipped or (lowest[plan.name] > -0.2) == plan.unsigned, plan.name


def test_a_model_on_the_meta_device_gives_the_same_plans(selected: Selected) -> None:
    with torch.device("meta"):
        model = type(selected.model)(selected.model.config)
    assert select(model, BinarizationConfig()) == selected.plans


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vision", ["resnet-18", "convnext"])
def test_a_model_of_another_dtype_gives_the_same_plans(
    vision: str, dtype: torch.dtype, tiny_vision_model: Factory
) -> None:
    model = tiny_vision_model(vision)
    plans = select(model, BinarizationConfig())
    assert select(model.to(dtype), BinarizationConfig()) == plans


@pytest.mark.parametrize("vision", ["resnet-50", "regnet-y", "swin"])
def test_the_model_is_left_untouched(vision: str, tiny_vision_model: Factory) -> None:
    model = tiny_vision_model(vision).train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    random_state = torch.get_rng_state()
    select(model, BinarizationConfig())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


INCLUDED = {
    "stem": ("resnet-18", "*embedder.convolution", {"embedder.embedder.convolution": SIGNED}),
    "head": ("resnet-18", "classifier.1", {"classifier.1": UNSIGNED}),
    "shortcut": ("resnet-18", "*shortcut*", {"encoder.stages.1.layers.0.shortcut.convolution": UNSIGNED}),
    "depthwise": (
        "mobilenet-v2",
        "*conv_3x3*",
        {"conv_stem.conv_3x3.convolution": UNSIGNED}
        | {f"layer.{i}.conv_3x3.convolution": UNSIGNED for i in range(16)},
    ),
    "depthwise of signed inputs": ("convnext", "*.1.layers.1.dwconv", {"encoder.stages.1.layers.1.dwconv": SIGNED}),
    "gate": (
        "regnet-y",
        "encoder.stages.1.layers.1.*attention*",
        {f"encoder.stages.1.layers.1.layer.2.attention.{i}": UNSIGNED for i in (0, 2)},  # averages of ReLU outputs
    ),
    "patch embedding": ("vit", "*patch_embeddings*", {"embeddings.patch_embeddings.projection": SIGNED}),
}


@pytest.mark.parametrize(("vision", "pattern", "names"), INCLUDED.values(), ids=list(INCLUDED))
def test_include_wins_over_every_role(
    vision: str, pattern: str, names: dict[str, str], tiny_vision_model: Factory
) -> None:
    plans = select(tiny_vision_model(vision), BinarizationConfig(include=[pattern]))
    included = {plan.key: plan for plan in plans if not plan.skipped and plan.role != "encoder"}
    assert {key: UNSIGNED if plan.unsigned else SIGNED for key, plan in included.items()} == names
    units = {plan.unit for plan in plans if not plan.skipped}
    assert units == set(range(len(units)))
    rows = dict(LAYERS[vision][1])
    for key, plan in included.items():
        assert plan.role == ("head" if key == LAYERS[vision][2] else rows[key])


@pytest.mark.parametrize(
    ("vision", "overrides"),
    [
        ("resnet-18", {"depths": [1, 1]}),
        ("mobilenet-v1", {}),
        ("regnet-y", {"depths": [1, 1]}),
        ("convnext", {"depths": [1, 1]}),
        ("swin", {"depths": [1, 1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_of_which_every_layer_is_binarized_makes_the_round_trip(
    vision: str, overrides: dict[str, Any], tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path
) -> None:
    model = tiny_vision_model(vision, **overrides)
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    calibrate(binarize(model, BinarizationConfig(include=["*"])), {"pixel_values": tiny_images(model, 4, seed=1)})
    packed = pack(freeze(model))
    assert packed_layers(packed).keys() == layers
    images = tiny_images(model, 3, height=37, width=45)
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(packed(images).logits, expected)
        packed.save_pretrained(tmp_path)
        loaded = owned(AutoModelForImageClassification.from_pretrained(tmp_path))
        assert torch.equal(loaded(images).logits, expected)


@pytest.mark.parametrize("vision", ["vit", "deit"])
def test_a_patch_embedding_whose_dtype_the_model_reads_is_refused(vision: str, tiny_vision_model: Factory) -> None:
    with pytest.raises(ValueError, match="include selects a layer with which the model cannot run .* patch embedding"):
        binarize(tiny_vision_model(vision), BinarizationConfig(include=["*patch_embeddings*"]))


def test_a_binarized_shortcut_is_of_the_unit_of_the_layer_beside_it(tiny_vision_model: Factory) -> None:
    plans = select(tiny_vision_model("resnet-50"), BinarizationConfig(include=["*shortcut*"]))
    units = {plan.key: plan.unit for plan in plans}
    for stage in (0, 1):
        block = f"encoder.stages.{stage}.layers.0"
        assert units[f"{block}.shortcut.convolution"] == units[f"{block}.layer.0.convolution"] == 6 * stage


@pytest.mark.parametrize(
    ("vision", "pattern", "left"),
    [
        ("resnet-18", "encoder.stages.0.*", 4),
        ("resnet-50", "resnet.*.layer.1.convolution", 8),
        ("regnet-y", "*.layer.1.convolution", 6),
        ("convnext", "*downsampling*", 6),
        ("swin", "*mlp*", 7),
    ],
    ids=str,
)
def test_exclude_keeps_layers_in_full_precision(
    vision: str, pattern: str, left: int, tiny_vision_model: Factory
) -> None:
    plans = select(tiny_vision_model(vision), BinarizationConfig(exclude=[pattern]))
    assert {plan.key for plan in plans if plan.skipped == "exclude"}
    units = {plan.unit for plan in plans if not plan.skipped}
    assert units == set(range(left))
    # A role that stays anyway keeps its name.
    assert [plan.role for plan in plans] == [
        plan.role for plan in select(tiny_vision_model(vision), BinarizationConfig())
    ]


# --- before training -------------------------------------------------------------------------------------------------


def test_soft_and_unclipped_is_the_unmodified_model_bit_for_bit(
    vision: str, tiny_vision_model: Factory, tiny_images: Factory
) -> None:
    model = tiny_vision_model(vision)
    twin = binarize(copy.deepcopy(model), BinarizationConfig(clip=None))
    images, labels = tiny_images(model, 4), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        assert torch.equal(twin(pixel_values=images).logits, model(pixel_values=images).logits)
    for each in (model.train(), twin.train()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            each(pixel_values=images, labels=labels).loss.backward()
    grads = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(grads[name].grad, parameter.grad), name
    for name, buffer in model.named_buffers():
        assert torch.equal(twin.get_buffer(name), buffer), name
    freeze(twin.eval())
    with torch.no_grad():
        assert not torch.equal(twin(pixel_values=images).logits, model.eval()(pixel_values=images).logits)


@pytest.mark.parametrize("vision", ["resnet-50", "convnext", "vit"])
def test_from_pretrained_gives_the_model_of_binarize(vision: str, tiny_vision_model: Factory, tmp_path: Path) -> None:
    tiny_vision_model(vision).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=BinarizationConfig())
    expected = binarize(tiny_vision_model(vision))
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert model.config.quantization_config.modules == expected.config.quantization_config.modules


def test_latent_kernels_stay_float32_in_a_half_precision_model(
    tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path
) -> None:
    tiny_vision_model("resnet-18").save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=BinarizationConfig(), dtype=torch.bfloat16
    )
    for layer in binary_layers(model).values():
        assert isinstance(layer, BinaryConv2d)
        assert layer.weight.dtype == layer.activation_scale.dtype == torch.float32
    assert model.resnet.embedder.embedder.normalization.weight.dtype == torch.bfloat16
    images = tiny_images(model, 4).bfloat16()
    freeze(model, 0.5)
    loss = model.train()(pixel_values=images, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert loss.isfinite() and all(layer.weight.grad.isfinite().all() for layer in binary_layers(model).values())
    calibrate(model, {"pixel_values": images})
    packed, model = pack(freeze(model)), model.eval()
    with torch.no_grad():
        assert torch.equal(packed(images).logits, model(images).logits)


def test_checkpoints_with_the_old_names_of_a_vit_load(
    tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path
) -> None:
    model = tiny_vision_model("vit")
    model.save_pretrained(tmp_path)
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("vit.layers", "vit.encoder.layer").replace("attention.o_proj", "attention.output.dense")
        for part in ("query", "key", "value"):
            name = name.replace(f"attention.{part[0]}_proj", f"attention.attention.{part}")
        old[name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = tensor.clone()
    assert len(old.keys() - model.state_dict().keys()) == 2 * 16
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    latent = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=BinarizationConfig())
    for name, tensor in model.state_dict().items():
        assert torch.equal(latent.state_dict()[name], tensor), name
    calibrate(owned(latent), {"pixel_values": tiny_images(model, 4)})
    packed = pack(freeze(latent))
    packed.save_pretrained(tmp_path / "packed")
    loaded = owned(AutoModelForImageClassification.from_pretrained(tmp_path / "packed"))
    with torch.no_grad():
        assert torch.equal(loaded(tiny_images(model)).logits, latent(tiny_images(model)).logits)


# --- there and back --------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A latent model after two steps, fully frozen, its packed copies and the folder of the folded one, which no test
    may change; inputs of several sizes; and its logits of them."""

    latent: PreTrainedModel
    packed: PreTrainedModel
    unfolded: PreTrainedModel
    folder: Path
    inputs: list[dict[str, Any]]
    logits: list[Tensor]

    @torch.no_grad()
    def assert_same(self, model: PreTrainedModel) -> None:
        for inputs, expected in zip(self.inputs, self.logits, strict=True):
            assert torch.equal(model(**inputs).logits, expected), inputs["pixel_values"].shape


@pytest.fixture(scope="module", params=[name for name in VISION_CONFIGS if name not in ("mobilenet-v1", "resnet-34")])
def trained(
    request: pytest.FixtureRequest,
    tiny_vision_model: Factory,
    tiny_images: Factory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """Each architecture but a deeper ResNet and a MobileNet, whose every layer is binarized in a test above."""
    model = binarize(tiny_vision_model(request.param), BinarizationConfig())
    images, labels = tiny_images(model, 4), torch.tensor([0, 1, 1, 0])
    calibrate(model, {"pixel_values": images})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, fraction in ((1, 0.5), (2, 1.0)):
        freeze(model.train(), fraction, step)
        optimizer.zero_grad()
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        for name, layer in binary_layers(model).items():
            assert layer.weight.grad.isfinite().all() and layer.weight.grad.any(), name
    # Any size where the architecture takes it; a ViT has to be asked.
    flag = {"interpolate_pos_encoding": True} if request.param in ("vit", "deit") else {}
    inputs: list[dict[str, Any]] = [{"pixel_values": tiny_images(model, 3, seed=1)}]
    for height, width in ((37, 45), (33, 64)):
        inputs.append({"pixel_values": tiny_images(model, 2, height=height, width=width, seed=width)} | flag)
    with torch.no_grad():
        logits = [model.eval()(**each).logits for each in inputs]
    assert all(each.std(dim=0).min() > 1e-4 for each in logits), "each image has logits of its own"
    packed, folder = pack(model), tmp_path_factory.mktemp("packed")
    packed.save_pretrained(folder)
    return Trained(model, packed, pack(model, fold_batch_norm=False), folder, inputs, logits)


def test_packed_it_gives_the_same_logits_bit_for_bit(trained: Trained) -> None:
    for packed in (trained.packed, trained.unfolded):
        assert packed_layers(packed).keys() == binary_layers(trained.latent).keys() and not binary_layers(packed)
        trained.assert_same(packed)


@pytest.mark.parametrize("fused", [False, True])
def test_with_kernels_it_gives_the_same_but_for_rounding(trained: Trained, fused: bool) -> None:
    """Of all architectures: windows, borders, groups, bits between layers. An input that rounding carries over its
    threshold would show as more, and there is none of that in these."""
    pytest.importorskip("numba", reason="the extra `fast` is not installed: there are no kernels to test")
    for packed in (copy.deepcopy(trained.packed), copy.deepcopy(trained.unfolded)):
        if fused:
            fuse(packed)
        with kernels.use("cpu"), torch.no_grad():
            for inputs, expected in zip(trained.inputs, trained.logits, strict=True):
                assert torch.allclose(packed(**inputs).logits, expected, atol=1e-4), inputs["pixel_values"].shape


def test_saved_and_loaded_it_gives_the_same_logits_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    loaded, packed = owned(AutoModelForImageClassification.from_pretrained(trained.folder)), trained.packed
    state = loaded.state_dict()
    assert state.keys() == packed.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.state_dict().items())
    trained.assert_same(loaded)
    assert loaded.config.quantization_config == packed.config.quantization_config
    loaded.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (trained.folder / name).read_bytes()


def test_the_latent_checkpoint_reloads(trained: Trained, tmp_path: Path) -> None:
    trained.latent.save_pretrained(tmp_path)
    loaded = owned(AutoModelForImageClassification.from_pretrained(tmp_path))
    trained.assert_same(loaded)
    for name, layer in binary_layers(trained.latent).items():
        other = loaded.get_submodule(name)
        assert isinstance(other, BinaryLayer) and other.calibrated and other.fraction == 1.0
        assert (other.unit, other.unsigned, other.key) == (layer.unit, layer.unsigned, layer.key)
    assert loaded.config.quantization_config == trained.latent.config.quantization_config


def test_unpacked_it_has_the_same_bits_and_trains(trained: Trained) -> None:
    latent = unpack(trained.unfolded)
    again = pack(latent, fold_batch_norm=False)
    for name, layer in packed_layers(trained.unfolded).items():
        other = again.get_submodule(name)
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.activation_threshold, layer.activation_threshold)
        assert torch.equal(other.activation_levels, layer.activation_levels)
        torch.testing.assert_close(other.weight_scale, layer.weight_scale, rtol=1e-6, atol=0)
    latent.train()(**trained.inputs[0]).logits.square().sum().backward()
    assert all(layer.weight.grad.any() for layer in binary_layers(latent).values())


def test_dequantized_it_is_the_same_model(trained: Trained) -> None:
    floats = copy.deepcopy(trained.packed).dequantize()
    trained.assert_same(floats)
    assert not packed_layers(floats)
    for name, layer in binary_layers(trained.latent).items():
        assert isinstance(floats.get_submodule(name), BinaryInput)
        assert floats.get_submodule(name).weight.shape == layer.weight.shape


def test_one_bit_a_weight_and_the_bytes_of_the_summary(trained: Trained) -> None:
    packed = trained.packed
    written = [tensor.nbytes for tensor in load_file(trained.folder / "model.safetensors").values()]
    assert sorted(written) == sorted(tensor.nbytes for tensor in packed.state_dict().values())
    tables = [summary(trained.latent), summary(packed)]
    for table in tables:
        for row in table.rows[:-1]:
            own = packed.get_submodule(row.name).state_dict()
            assert row.packed_bytes == sum(tensor.nbytes for tensor in own.values()), row.name
    before, after = ([(r.name, r.role, r.unit, r.weight_bits, r.levels) for r in t.rows[:-1]] for t in tables)
    assert before == after
    for name, layer in packed_layers(packed).items():
        shape = trained.latent.get_submodule(name).weight.shape
        assert layer.weight.nbytes == shape[0] * math.ceil(math.prod(shape[1:]) / 8)


@pytest.mark.parametrize("vision", ["resnet-18", "vit", "swin"])
def test_the_names_in_a_saved_file_are_those_of_the_modules(
    vision: str, tiny_vision_model: Factory, tmp_path: Path
) -> None:
    # The Trainer resumes by them, and so does a reader of the format; transformers has older names for some of them.
    latent = freeze(binarize(tiny_vision_model(vision)))
    for model in (latent, pack(latent)):
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "arguments", [{"activations": False}, {"scale": "tensor", "learn_activation_shift": False}], ids=str
)
@pytest.mark.parametrize("vision", ["resnet-18", "regnet-y"])
def test_other_rules_make_the_round_trip_too(
    vision: str, arguments: dict[str, Any], tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path
) -> None:
    latent = binarize(tiny_vision_model(vision, depths=[1, 1]), BinarizationConfig(**arguments))
    images = tiny_images(latent, 2, height=37, width=45)
    calibrate(latent, {"pixel_values": images})
    packed = pack(freeze(latent))
    packed.save_pretrained(tmp_path)
    loaded = owned(AutoModelForImageClassification.from_pretrained(tmp_path))
    with torch.no_grad():
        expected = latent(images).logits
        assert torch.equal(packed(images).logits, expected) and torch.equal(loaded(images).logits, expected)


def test_the_rest_in_half_precision(tiny_vision_model: Factory, tiny_images: Factory, tmp_path: Path) -> None:
    latent = binarize(tiny_vision_model("resnet-50"))
    images = tiny_images(latent, 4)
    calibrate(latent, {"pixel_values": images})
    half, full = pack(freeze(latent), dtype=torch.bfloat16), pack(latent)
    for name, layer in packed_layers(full).items():
        other = half.get_submodule(name)
        for key, tensor in layer.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), f"{name}.{key}"
    half.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert summary(loaded).frozen_fraction == 1.0
    with torch.no_grad():
        assert torch.equal(owned(loaded)(images.bfloat16()).logits, half(images.bfloat16()).logits)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_resnet(tiny_vision_model: Factory, tiny_images: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a packed ResNet, which no test may change."""
    latent = binarize(tiny_vision_model("resnet-18", depths=[1, 1]))
    calibrate(latent, {"pixel_values": tiny_images(latent, 4)})
    folder = tmp_path_factory.mktemp("packed")
    pack(freeze(latent), fold_batch_norm=False).save_pretrained(folder)
    return folder


CONVOLUTION = "resnet.encoder.stages.1.layers.0.layer.1.convolution"
NORM = "resnet.encoder.stages.1.layers.0.layer.1.normalization"


@pytest.mark.parametrize(
    "missing",
    [f"{NORM}.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    + [f"{CONVOLUTION}.{name}" for name in ("weight", "weight_scale", "activation_threshold", "activation_levels")]
    + ["resnet.embedder.embedder.convolution.weight"],
)
def test_a_missing_tensor_is_an_error_that_names_it(missing: str, packed_resnet: Path, tmp_path: Path) -> None:
    shutil.copytree(packed_resnet, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"no tensor {missing}: it is incomplete"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    {
        "float weight": {"weight": torch.ones(12, 12, 3, 3)},
        "bits of a linear layer": {"weight": torch.zeros(12, 2, dtype=torch.uint8)},
        "set padding": {"weight": torch.full((12, 14), 255, dtype=torch.uint8)},
        "thresholds of the outputs": {"activation_threshold": torch.zeros(13)},
        "infinite threshold": {"activation_threshold": torch.full((12,), torch.inf)},
        "negative scale": {"weight_scale": -torch.ones(12)},
        "other levels": {"activation_levels": torch.tensor([0.5, 1.0])},
        "unknown bias": {"bias": torch.zeros(12)},
    }.items(),
    ids=lambda change: change[0],
)
def test_a_wrong_tensor_is_refused_by_name(
    change: tuple[str, dict[str, Tensor]], packed_resnet: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed_resnet, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    ((name, tensor),) = change[1].items()
    tensors[f"{CONVOLUTION}.{name}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    kernel = r"resnet\.encoder\.stages\.1\.layers\.0\.layer\.1\.convolution\."
    with pytest.raises(ValueError, match=kernel + name):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_loading_without_the_package_fails_loudly(packed_resnet: Path) -> None:
    load = f"AutoModelForImageClassification.from_pretrained({str(packed_resnet)!r})"
    code = f"from transformers import AutoModelForImageClassification; {load}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr.lower() or "mismatched" in done.stderr.lower(), done.stderr[-2000:]


# --- real sizes ------------------------------------------------------------------------------------------------------

REAL: dict[str, tuple[dict[str, Any], int, int]] = {
    "resnet-18": (
        {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
        11_689_512,
        16,
    ),
    "resnet-34": (
        {"hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3], "layer_type": "basic"},
        21_797_672,
        32,
    ),
    "resnet-50": ({}, 25_557_032, 48),
}
"""Arguments of the config, parameters of the published model, and units."""


def bytes_of_a_resnet(widths: list[int], depths: list[int], bottleneck: bool) -> int:
    """Of all its layers, packed: three 3x3 or 1x1, 3x3 and 1x1 convolutions in a block, and one around some."""

    def binary(inputs: int, outputs: int, kernel: int) -> int:
        return outputs * math.ceil(inputs * kernel**2 / 8) + 4 * outputs + 4 * inputs + 8

    total, inputs = 4 * 3 * 64 * 49 + 4 * 1000 * (widths[-1] + 1), 64
    for stage, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            if i == 0 and (stage > 0 or bottleneck):
                total += 4 * inputs * outputs
            if bottleneck:
                inner = outputs // 4
                total += binary(inputs, inner, 1) + binary(inner, inner, 3) + binary(inner, outputs, 1)
            else:
                total += binary(inputs, outputs, 3) + binary(outputs, outputs, 3)
            inputs = outputs
    return total


@pytest.mark.parametrize("name", REAL)
def test_the_size_of_published_resnets(name: str) -> None:
    arguments, parameters, units = REAL[name]
    config = ResNetConfig(**arguments, num_labels=1000)
    with torch.device("meta"):
        model = ResNetForImageClassification(config)
    table = summary(model, BinarizationConfig())
    assert table.parameters == parameters == sum(p.numel() for p in model.parameters())
    assert table.float_bytes == 4 * parameters + sum(b.nbytes for b in model.buffers())  # of batch norms
    layers = table.rows[:-1]
    expected = bytes_of_a_resnet(config.hidden_sizes, config.depths, config.layer_type == "bottleneck")
    assert sum(row.packed_bytes for row in layers) == expected
    assert {row.unit for row in layers} == {None, *range(units)}
    assert {row.levels for row in layers if row.unit is not None} == {UNSIGNED}
    if name == "resnet-18":
        assert table.packed_bytes <= 4_500_000
        assert PackedConv2d.empty(model.get_submodule(layers[1].name), True).weight.shape == (64, 72)
