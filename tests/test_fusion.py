"""Packed layers that hand bits on: which do, and that the same numbers come out."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_stompp import BinarizationConfig, binarize, calibrate, kernels, pack, unpack
from hf_stompp.fusion import PassesBits, fuse
from hf_stompp.layers import PackedLayer
from hf_stompp.patching import binary_layers, packed_layers

pytest.importorskip("numba", reason="the extra `fast` is not installed: nothing hands bits on")

Factory = Callable[..., Any]


def packed(model: PreTrainedModel, inputs: dict[str, Tensor], **config: Any) -> PreTrainedModel:
    """A packed copy with calibrated scales."""
    model = binarize(copy.deepcopy(model), BinarizationConfig(**config))
    calibrate(model, inputs)
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=0)
    made = pack(model)
    fuse(made)
    return made


def handing_on(model: nn.Module) -> list[str]:
    return [name for name, layer in packed_layers(model).items() if layer.next_threshold is not None]


@pytest.fixture
def texts() -> dict[str, Tensor]:
    ids = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def unfused(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in packed_layers(model).values():
        layer.next_threshold = None
    return model


@pytest.mark.parametrize("config", [{}, {"replace_gelu": True}, {"activation_levels": "signed"}], ids=str)
@pytest.mark.parametrize(
    ("architecture", "first", "blocks"),
    [("bert", "intermediate.dense", 2), ("distilbert", "ffn.lin1", 2), ("electra", "intermediate.dense", 2)],
)
def test_feed_forward_blocks_hand_bits_on(
    architecture: str, first: str, blocks: int, config: dict[str, Any], tiny_model: Factory, texts: dict[str, Tensor]
) -> None:
    model = packed(tiny_model(architecture), texts, **config)
    names = handing_on(model)
    # A GELU does not rise below 0, where the thresholds of signed levels may be.
    assert len(names) == (0 if "activation_levels" in config else blocks)
    assert all(name.endswith(first) for name in names)
    taken: list[torch.dtype] = []
    for name, layer in packed_layers(model).items():
        if name.endswith(("output.dense", "ffn.lin2")) and "attention" not in name:
            layer.register_forward_pre_hook(lambda _, args: taken.append(args[0].dtype))
    with kernels.use("cpu"):
        fused = logits(model, texts)
        assert taken == blocks * [torch.int32 if names else torch.float32]
        assert torch.equal(fused, logits(unfused(model), texts))
        with_gradients = model(**texts).logits
        assert torch.equal(fused, with_gradients) and with_gradients.requires_grad
    with kernels.use("reference"):
        assert torch.allclose(fused, logits(model, texts), atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"replace_relu": True}], ids=str)
@pytest.mark.parametrize(("vision", "least"), [("resnet-18", 2), ("resnet-50", 2), ("mobilenet-v2", 0)])
def test_convolutions_hand_bits_on_where_norms_were_folded(
    vision: str, least: int, config: dict[str, Any], tiny_vision_model: Factory
) -> None:
    images = {"pixel_values": torch.randn(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))}
    model = packed(tiny_vision_model(vision), images, **config)
    assert len(handing_on(model)) >= least
    with kernels.use("cpu"):
        fused = logits(model, images)
        assert torch.equal(fused, logits(unfused(model), images))
    with kernels.use("reference"):
        assert torch.allclose(fused, logits(model, images), atol=1e-4)


def test_the_threshold_before_an_activation_is_the_first_float_that_reaches_it(
    tiny_model: Factory, texts: dict[str, Tensor]
) -> None:
    model = packed(tiny_model("bert"), texts)
    (first, *_) = handing_on(model)
    layer, block = model.get_submodule(first), model.bert.encoder.layer[0]
    assert isinstance(layer, PackedLayer) and isinstance(block.intermediate.intermediate_act_fn, PassesBits)
    gelu, threshold = block.intermediate.intermediate_act_fn.activation, block.output.dense.activation_threshold
    assert (gelu(layer.next_threshold) >= threshold).all()
    below = torch.nextafter(layer.next_threshold, torch.zeros(1))
    assert (gelu(below) < threshold).all()


def test_it_is_not_in_the_files(tiny_model: Factory, texts: dict[str, Tensor], tmp_path: Path) -> None:
    model = packed(tiny_model("bert"), texts)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert handing_on(loaded) == []
    fuse(loaded)
    assert handing_on(loaded) == handing_on(model) != []
    assert not any("next_threshold" in name or "activation_fn.activation" in name for name in loaded.state_dict())
    with kernels.use("cpu"):
        assert torch.equal(logits(loaded, texts), logits(model, texts))
        cast = logits(copy.deepcopy(loaded).to(torch.bfloat16), texts)
    assert torch.allclose(cast.float(), logits(model, texts), atol=0.05)


def test_other_forms_of_the_model_are_without_it(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = packed(tiny_model("bert"), texts)
    floats = copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, PassesBits) for module in floats.modules())
    with kernels.use("cpu"):
        expected = logits(model, texts)
        assert torch.allclose(logits(floats, texts), expected, atol=1e-5)
        assert torch.allclose(logits(unpack(model).eval(), texts), expected, atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(logits(compiled, texts), expected, atol=1e-5)


def test_another_reader_of_the_outputs_gets_floats(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    """As where the feed-forward block has a shortcut of its own."""
    model = tiny_model("bert")

    class Twice(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) + 0.0 * x

    for block in model.bert.encoder.layer:
        block.intermediate.intermediate_act_fn = Twice(block.intermediate.intermediate_act_fn)
    assert handing_on(packed(model, texts)) == []


def test_a_sigmoid_is_above_0_before_0(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = tiny_model("bert", hidden_act="sigmoid")
    assert handing_on(packed(model, texts)) == []


def test_a_model_in_training_mode_hands_nothing_on(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    """Dropout, which stands between some layers, takes floats."""
    model = packed(tiny_model("bert"), texts)
    assert handing_on(model)
    taken: list[torch.dtype] = []
    model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda _, args: taken.append(args[0].dtype))
    with kernels.use("cpu"):
        logits(model.train(), texts)
        logits(model.eval(), texts)
    assert taken == [torch.float32, torch.int32]
