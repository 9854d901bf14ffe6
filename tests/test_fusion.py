"""Fused models: what is fused, and that the same numbers come out."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_stompp import BinarizationConfig, binarize, calibrate, kernels, pack, unpack
from hf_stompp.fusion import _before, fuse, unfuse
from hf_stompp.layers import PackedLayer, PackedLinear
from hf_stompp.layers.fused import PassesBits, ResidualNorm, SharedInput, sharing
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
    unfuse(model)
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
        # A norm of another order of sums rounds otherwise; all else is the same bit for bit.
        assert torch.allclose(fused, logits(unfused(model), texts), atol=1e-6)
        with_gradients = model(**texts).logits
        assert torch.equal(logits(unfused(model), texts), with_gradients) and with_gradients.requires_grad
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
    assert not any("next_threshold" in name or name.endswith(".activation") for name in loaded.state_dict())
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


@pytest.mark.parametrize(("architecture", "blocks"), [("bert", 4), ("distilbert", 0), ("electra", 4)])
def test_queries_keys_and_values_pack_their_input_once(
    architecture: str, blocks: int, tiny_model: Factory, texts: dict[str, Tensor]
) -> None:
    model = packed(tiny_model(architecture), texts, activation_levels="signed")  # whose thresholds are all 0
    fused = fuse(model)
    assert len(fused.inputs) == 2 and all(len(names) == 3 for names in fused.inputs) and len(fused.norms) == blocks
    for name in fused.norms:  # which round otherwise, and are tried below
        block = model.get_submodule(name)
        assert isinstance(block, ResidualNorm)
        model.set_submodule(name, block.unfused())
    run: list[str] = []
    for name in fused.inputs[0]:
        layer = model.get_submodule(name)
        group, _ = layer.shared
        layer.register_forward_hook(lambda layer, args, out, name=name: run.append((name, out.is_contiguous())))
    with kernels.use("cpu"):
        shared = logits(model, texts)
        assert run == [(name, False) for name in fused.inputs[0]]  # parts of one result
        assert torch.equal(shared, logits(unfused(model), texts))
        assert torch.equal(shared, logits(copy.deepcopy(model), texts))
        assert torch.equal(shared, model(**texts).logits)


class Negated(nn.Module):
    """A layer that leaves another input to those after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.neg_())


@torch.inference_mode()
def test_an_input_that_is_written_to_in_between_is_another(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    """Though it is the same tensor, and one of inference mode does not tell."""
    model = packed(tiny_model("bert"), texts, activation_levels="signed")
    unfuse(model)
    attention = model.bert.encoder.layer[0].attention.self
    attention.key = Negated(attention.key)
    before = model(**texts).logits
    first, second = fuse(model).inputs
    assert [name.removeprefix("bert.encoder.layer.0.attention.self.") for name in first] == ["key.layer", "value"]
    assert len(second) == 3 and torch.allclose(model(**texts).logits, before, atol=1e-5)


@torch.no_grad()
def test_each_call_with_a_shared_input_gives_what_the_layer_gives() -> None:
    """Also when one layer is called twice, and in another order; nothing is left with the input."""
    layers = [PackedLinear.empty(nn.Linear(40, outputs), True) for outputs in (70, 3, 64)]
    for i, layer in enumerate(layers):
        layer.weight.random_(256, generator=torch.Generator().manual_seed(i))
        layer.activation_levels.copy_(torch.tensor([-0.5 - i, 0.5 + i]))
    group, x = SharedInput(layers), torch.randn(2, 5, 40)
    with kernels.use("cpu"):
        expected = [layer(x) for layer in layers]
        for place in (2, 0, 2, 1, 0):
            assert torch.equal(group(x, place), expected[place])
        assert not vars(x)
        group(x, 1)
        assert copy.deepcopy(x)._hf_stompp_outputs is None  # of this process, and heavy
        x.neg_()
        assert torch.equal(group(x, 0), layers[0](x)) and not torch.equal(layers[0](x), expected[0])


def test_inputs_are_shared_where_their_bits_are_the_same() -> None:
    layers = [PackedLinear.empty(nn.Linear(8, 3), True) for _ in range(2)]
    for layer in layers:
        layer.activation_levels.copy_(torch.tensor([-1.0, 1.0]))
    assert sharing(layers)
    layers[1].activation_levels.copy_(torch.tensor([0.0, 1.0]))
    assert not sharing(layers)
    layers[1].activation_levels.copy_(torch.tensor([-2.0, 2.0]))
    assert sharing(layers)
    layers[1].activation_threshold[3] = 1e-30
    assert not sharing(layers)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (0, 5), (2, 3, 100), (70, 768)])
@torch.no_grad()
def test_sums_and_norms_against_float64(shape: tuple[int, ...]) -> None:
    add_norm = kernels.loaded("normalization").add_norm

    x, residual = torch.randn(2, *shape) * 3 + 1
    norm = nn.LayerNorm(shape[-1], eps=1e-12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    total = x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias
    for one in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        y = add_norm(one, residual, norm.weight, norm.bias, norm.eps)
        assert torch.allclose(y.double(), expected, atol=1e-5)
    assert torch.allclose(norm(x + residual).double(), expected, atol=1e-5)


@torch.no_grad()
def test_sums_that_are_not_finite_are_nowhere_else() -> None:
    add_norm = kernels.loaded("normalization").add_norm

    x = torch.randn(4, 50)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = add_norm(x, torch.zeros(4, 50), torch.ones(50), torch.zeros(50), 1e-5)
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


def test_only_blocks_that_compute_it_are_taken_for_output_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.dropout, self.LayerNorm = nn.Linear(4, 6), nn.Dropout(), nn.LayerNorm(6)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.LayerNorm(self.dropout(self.dense(x)) + residual)

    class Reversed(Block):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.LayerNorm(self.dense(x)) + residual

    class Alone(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.LayerNorm(self.dense(x))

    with torch.no_grad():
        assert ResidualNorm.fits(Block().eval())
        assert not ResidualNorm.fits(Reversed().eval()) and not ResidualNorm.fits(Alone().eval())
        other = Block().eval()
        other.LayerNorm = nn.RMSNorm(6)
        assert not ResidualNorm.fits(other)


def test_parts_that_were_put_in_after_fusing_stay(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = packed(tiny_model("bert"), texts)
    names = list(model.state_dict())
    block = model.bert.encoder.layer[0].output
    assert isinstance(block, ResidualNorm)
    block.LayerNorm = norm = nn.LayerNorm(block.LayerNorm.normalized_shape)
    unfuse(model)
    assert model.bert.encoder.layer[0].output.LayerNorm is norm and list(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_hand_on_the_bits_of_what_was_rounded(
    dtype: torch.dtype, tiny_model: Factory, texts: dict[str, Tensor]
) -> None:
    model = packed(tiny_model("bert"), texts).to(dtype)
    assert len(fuse(model).bits) == 2
    with kernels.use("cpu"):
        fused = logits(model, texts)
        assert fused.dtype == dtype and torch.equal(fused, logits(unfused(model), texts))


def test_hooks_are_heard(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = packed(tiny_model("bert"), texts)
    unfuse(model)
    heard: list[str] = []
    block = model.bert.encoder.layer[0]
    for name in ("output", "intermediate.intermediate_act_fn", "attention.output.LayerNorm"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: heard.append(name))
    fused = fuse(model)
    assert len(fused.bits) == 1 and len(fused.norms) == 2 and all("layer.1" in name for name in fused.norms)
    heard.clear()
    with kernels.use("cpu"):
        logits(model, texts)
    assert sorted(heard) == ["attention.output.LayerNorm", "intermediate.intermediate_act_fn", "output"]


def test_an_activation_of_two_layers_stays(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = tiny_model("bert")
    blocks = model.bert.encoder.layer
    blocks[1].intermediate.intermediate_act_fn = blocks[0].intermediate.intermediate_act_fn
    assert handing_on(packed(model, texts)) == []


def test_a_model_in_training_mode_is_refused(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"training mode: call model.eval\(\)"):
        fuse(packed(tiny_model("bert"), texts).train())


def test_what_cannot_be_fused(tiny_model: Factory) -> None:
    with pytest.raises(ValueError, match=r"this one is latent: fuse what pack\(model\) gives"):
        fuse(binarize(tiny_model("bert")).eval())
    with pytest.raises(TypeError, match="takes a transformers.PreTrainedModel, not a Linear"):
        fuse(nn.Linear(3, 3))


def test_without_the_kernels_it_says_that_it_changes_nothing(
    tiny_model: Factory, texts: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = unfused(packed(tiny_model("bert"), texts))
    expected = logits(model, texts)
    with kernels.use("reference"):
        fuse(model)
        assert "changes nothing here" in caplog.text
    assert torch.allclose(logits(model, texts), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Identity()], ids=str)
def test_thresholds_before_activations_of_all_sizes(function: nn.Module, dtype: torch.dtype) -> None:
    """Those of float16 were lost where a function of infinity is no number."""
    threshold = torch.linspace(0.01, 5, 200)
    found = _before(function, threshold, dtype, above_zero=not isinstance(function, nn.Identity))
    below = torch.nextafter(found, torch.tensor(0.0))
    assert (function(found.to(dtype)).float() >= threshold).all()
    assert (function(below.to(dtype)).float() < threshold).all()


@pytest.mark.parametrize("architecture", ["albert", "roberta", "deberta-v2"])
def test_other_models_give_the_same(architecture: str, tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = packed(tiny_model(architecture), texts, activation_levels="signed")
    fused = fuse(model)
    names = [name for group in fused.inputs for name in group]
    assert len(names) == len(set(names))
    with kernels.use("cpu"):
        assert torch.allclose(logits(model, texts), logits(unfused(model), texts), atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(logits(model, texts), logits(unfused(model), texts), atol=0.02)


@torch.no_grad()
def test_norms_that_are_put_in_afterwards_are_torchs_part(tiny_model: Factory, texts: dict[str, Tensor]) -> None:
    model = packed(tiny_model("bert"), texts)
    block = model.bert.encoder.layer[0].output
    features = block.LayerNorm.normalized_shape
    strided = nn.LayerNorm(features)
    strided.weight = nn.Parameter(torch.randn(2 * features[0])[::2])
    for norm in (nn.LayerNorm(features, bias=False), nn.RMSNorm(features), strided):
        block.LayerNorm = norm
        with kernels.use("cpu"):
            assert torch.allclose(logits(model, texts), logits(unfused(model), texts), atol=1e-6)


def test_threads_give_the_same_sums_norms_and_weights() -> None:
    dense = kernels.loaded("dense").dense
    add_norm = kernels.loaded("normalization").add_norm

    x, residual, bits = torch.randn(300, 768), torch.randn(300, 768), torch.randint(256, (900, 96), dtype=torch.uint8)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = add_norm(x, residual, torch.ones(768), torch.zeros(768), 1e-5)
            found.append((y, dense(bits, torch.ones(900), 767)))
    finally:
        torch.set_num_threads(threads)
    for y, weight in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(weight, found[0][1])
