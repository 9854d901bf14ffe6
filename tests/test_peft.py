"""Adapters of PEFT on 1-bit models: what they compute, that they are saved and trained, and what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainerCallback

from hf_stompp import BinarizationConfig, binarize, kernels, pack
from hf_stompp.fusion import fuse
from hf_stompp.layers import BinaryConv2d, PackedConv2d, PackedLinear
from hf_stompp.patching import binary_layers

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

TARGETS = ["query", "value", "dense"]
DENSE = "bert.encoder.layer.0.attention.output.dense"


def with_adapter(model: nn.Module, seed: int = 0, name: str = "default", **config: Any) -> Any:
    """The model with a LoRA that is not zero, as if it had been trained."""
    config = {"r": 4, "target_modules": TARGETS, "task_type": "SEQ_CLS"} | config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(name, LoraConfig(**config))
        else:
            model = get_peft_model(model, LoraConfig(**config), adapter_name=name)
        for parameter, values in model.named_parameters():
            if f"lora_B.{name}" in parameter:
                nn.init.normal_(values, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.fixture
def packed(packed_folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(packed_folder)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_an_adapter_adds_its_product_to_what_a_packed_layer_gives(packed: PreTrainedModel, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    model = with_adapter(packed, target_modules=[DENSE], lora_alpha=12)
    layer = model.get_submodule(f"base_model.model.{DENSE}")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    base = layer.base_layer
    assert isinstance(base, PackedLinear)
    signs = torch.where(x >= base.activation_threshold, *base.activation_levels.flip(0).unbind()).double()
    expected = signs @ base.dequantized_weight().double().T + base.bias.double()
    a, b = (getattr(layer, half)["default"].weight.double() for half in ("lora_A", "lora_B"))
    expected += 12 / 4 * (x.double() @ a.T @ b.T)
    with kernels.use(backend):
        assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_adapter_adds_its_product_to_what_a_packed_convolution_gives(
    tiny_vision_model: Callable[..., Any], tiny_images: Callable[..., Tensor]
) -> None:
    model = binarize(tiny_vision_model("resnet-18"), BinarizationConfig())
    for each in binary_layers(model).values():
        each.set_frozen(1.0, step=1)
    packed = pack(model)
    name = next(
        name for name, each in packed.named_modules() if isinstance(each, PackedConv2d) and each.stride[0] == 2
    )
    before = packed(tiny_images(packed)).logits
    fresh = get_peft_model(packed, LoraConfig(r=2, target_modules=[name]))
    assert torch.equal(fresh(tiny_images(packed)).logits, before)  # B is 0
    layer = fresh.get_submodule(f"base_model.model.{name}")
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert type(a) is type(b) is nn.Conv2d and b.kernel_size == (1, 1)
    nn.init.normal_(b.weight)
    x = torch.randn(2, layer.base_layer.in_channels, 9, 7)
    halves = (half.weight.double() for half in (a, b))
    down = nn.functional.conv2d(x.double(), next(halves), stride=2, padding=layer.base_layer.padding)
    expected = layer.base_layer(x) + 8 / 2 * nn.functional.conv2d(down, next(halves))
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["latent", "packed"])
@torch.no_grad()
def test_an_adapter_of_a_convolution_has_its_dilation_and_groups(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)
            latent = BinaryConv2d.from_float(layer, BinarizationConfig(), key="", unit=0, unsigned=False)
            latent.set_frozen(1.0, step=1)
            self.layer = latent if kind == "latent" else PackedConv2d.from_binary(latent)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x = torch.randn(2, 4, 7, 6)
    base = Model()(x)
    with pytest.raises(ValueError, match="rank"):
        get_peft_model(Model(), LoraConfig(r=3, target_modules=["layer"]))
    model = get_peft_model(Model(), LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]))
    layer = model.base_model.model.layer
    nn.init.normal_(layer.lora_B["default"].weight)
    a, b = (half["default"].weight.double() for half in (layer.lora_A, layer.lora_B))
    down = nn.functional.conv2d(x.double(), a, stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=4 // a.shape[1])
    expected = layer.base_layer(x) + nn.functional.conv2d(down, b, groups=2 // b.shape[1])
    assert model(x).shape == base.shape
    assert torch.allclose(model(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_switched_disabled_and_combined(
    packed: PreTrainedModel, tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    batch = tiny_batch()
    base = logits(packed, batch)
    model = with_adapter(packed, seed=1, name="one", task_type=None)
    one = logits(model, batch)
    model = with_adapter(model, seed=2, name="two", task_type=None)
    model.set_adapter("two")
    two = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.set_adapter("one")
    assert torch.equal(logits(model, batch), one)
    assert not torch.equal(one, base) and not torch.equal(two, one)
    model.base_model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "first", combination_type="linear")
    model.base_model.set_adapter("first")
    assert torch.allclose(logits(model, batch), one, atol=1e-5)
    model.delete_adapter("first")
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["one", "two", "__base__"]).logits
    assert torch.allclose(mixed, torch.stack([one[0], two[1], base[2]]), atol=1e-5)


def test_an_adapter_comes_back_as_it_was_saved(
    packed: PreTrainedModel, packed_folder: Path, tmp_path: Path, tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model = with_adapter(packed, modules_to_save=["classifier"])
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = logits(model, tiny_batch())
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(packed_folder)
    assert (folder / "adapter_model.safetensors").stat().st_size < 20_000
    again = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    auto = peft.AutoPeftModelForSequenceClassification
    for loaded in (PeftModel.from_pretrained(again, folder), auto.from_pretrained(folder)):
        assert torch.equal(logits(loaded.eval(), tiny_batch()), expected)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(plain.eval(), tiny_batch()), expected)


def test_the_trainer_trains_and_resumes_an_adapter_on_a_packed_base(
    packed: PreTrainedModel, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def trained(folder: str, **arguments: Any) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", lora_dropout=0.1)
            model = get_peft_model(copy.deepcopy(packed), config)
        trainer = make_trainer(
            model, callback=TrainerCallback(), output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=8
        )
        trainer.train(**arguments)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = trained("whole")
    assert all(value.any() for name, value in whole.items() if "lora_B" in name)  # which began as 0
    base = packed.state_dict()
    for name, value in whole.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in base and not plain.startswith("classifier"):
            assert torch.equal(value, base[plain]), name
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    assert not (checkpoint / "model.safetensors").exists()
    resumed = trained("again", resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_latent_layers_take_adapters(
    make_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    latent = make_model()
    for each in binary_layers(latent).values():
        each.set_frozen(1.0, step=1)
    packed = pack(latent)
    batch = tiny_batch()
    adapted = with_adapter(latent)
    assert torch.allclose(logits(adapted, batch), logits(with_adapter(packed), batch), atol=1e-5)
    trainable = {name for name, values in adapted.named_parameters() if values.requires_grad}
    assert trainable and all("lora_" in name or "classifier" in name for name in trainable)


def test_a_fused_model_that_gets_an_adapter_is_taken_apart(
    tiny_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    pytest.importorskip("numba")
    model = tiny_model("bert", hidden_act="relu")
    model = binarize(model, BinarizationConfig(learn_activation_shift=False))
    for each in binary_layers(model).values():
        each.set_frozen(1.0, step=1)
    fused, plain = pack(model), pack(model)
    with kernels.use("cpu"):
        assert any(fuse(fused))
        found = logits(with_adapter(fused), tiny_batch())
        assert torch.allclose(found, logits(with_adapter(plain), tiny_batch()), atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("kind", ["latent", "packed", "dequantized"])
def test_merging_into_one_bit_is_refused(
    make_model: Callable[..., PreTrainedModel], merge: str, kind: str, tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model: Any = make_model()
    for each in binary_layers(model).values():
        each.set_frozen(1.0, step=1)
    model = model if kind == "latent" else pack(model) if kind == "packed" else pack(model).dequantize()
    adapted = with_adapter(model)
    before = logits(adapted, tiny_batch())
    with pytest.raises(ValueError, match=r"merge: the adapter of 'bert\.encoder.* one layer computes both"):
        getattr(adapted, merge)()
    assert torch.equal(logits(adapted, tiny_batch()), before)


def test_weights_alone_are_merged_after_they_are_dequantized(
    make_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model = make_model(activations=False)
    for each in binary_layers(model).values():
        each.set_frozen(1.0, step=1)
    adapted = with_adapter(pack(model))
    with pytest.raises(ValueError, match=r"dequantize\(\)` has float weights"):
        adapted.merge_and_unload()
    expected = logits(adapted, tiny_batch())
    merged = with_adapter(pack(model).dequantize()).merge_and_unload()
    assert torch.allclose(logits(merged, tiny_batch()), expected, atol=1e-5)


REFUSED = {
    "use_dora": {"use_dora": True},
    "init_lora_weights is 'pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights is 'olora'": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("field", list(REFUSED))
@pytest.mark.parametrize("targets", [["query"], "all-linear", r".*\.query"])
def test_what_needs_float_weights_is_refused(packed: PreTrainedModel, field: str, targets: Any) -> None:
    before = copy.deepcopy(packed.state_dict())
    with pytest.raises(ValueError, match=rf"LoraConfig\.{field}.* layers with 1-bit weights, 'bert\.encoder"):
        get_peft_model(packed, LoraConfig(target_modules=targets, **REFUSED[field]))
    assert packed.state_dict().keys() == before.keys()
    get_peft_model(packed, LoraConfig(target_modules=["classifier"], use_dora=True))  # which has float weights


def test_copies_of_bits_are_not_trained(packed: PreTrainedModel) -> None:
    config = LoraConfig(target_modules=["classifier"], modules_to_save=["intermediate"])
    with pytest.raises(ValueError, match=r"modules_to_save: received 'intermediate'.*which has 1-bit weights"):
        get_peft_model(packed, config)
    get_peft_model(packed, LoraConfig(target_modules=["classifier"], modules_to_save=["LayerNorm"]))


def test_fields_that_look_at_layers_otherwise_are_refused(
    packed: PreTrainedModel, make_model: Callable[..., PreTrainedModel]
) -> None:
    fields: dict[str, Any] = {
        "target_parameters": ["query.weight"],
        "trainable_token_indices": {"word_embeddings": [1]},
        "layer_replication": [(0, 1), (0, 1)],
    }
    for field, value in fields.items():
        for model in (packed, make_model()):
            with pytest.raises(ValueError, match=rf"LoraConfig\.{field} is .* not for models with 1-bit weights"):
                get_peft_model(model, LoraConfig(target_modules=[], **{field: value}))


def test_a_model_with_adapters_is_not_fused(packed: PreTrainedModel) -> None:
    model = with_adapter(packed)
    for one in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="has adapters, which read what fuse would leave out"):
            fuse(one)


@pytest.mark.parametrize("method", ["LoHaConfig", "VeraConfig", "OFTConfig"])
def test_other_methods_of_weights_are_refused(packed: PreTrainedModel, method: str) -> None:
    with pytest.raises(ValueError, match=r"Allowed for them: LORA, IA3, and prompts and prefixes"):
        get_peft_model(packed, getattr(peft, method)(target_modules=["query"]))


METHODS = {
    "IA3Config": {"target_modules": ["query", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_without_arithmetic_of_weights_train(
    packed: PreTrainedModel, method: str, tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model = get_peft_model(packed, getattr(peft, method)(task_type="SEQ_CLS", **METHODS[method]))
    model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    trained = {name for name, values in model.named_parameters() if values.grad is not None}
    assert trained and all(values.requires_grad for name, values in model.named_parameters() if name in trained)
    assert not any("encoder.layer" in name and "ia3" not in name for name in trained)
