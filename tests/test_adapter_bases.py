"""Adapters and their bases: which bits they belong to, bases that are trained with them, packed and summarised."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from hf_stompp import BinarizationConfig, StomppCallback, binarize, model_card, pack, summary, unpack
from hf_stompp.patching import binary_layers, bits_of, packed_layers

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from hf_stompp.peft import train_base, without_adapters  # noqa: E402
from hf_stompp.peft.records import BITS  # noqa: E402

Auto = AutoModelForSequenceClassification
CONFIG: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"}


def adapted(model: nn.Module, kind: type = LoraConfig, **config: Any) -> Any:
    """With a LoRA that is not zero, as if it had been trained."""
    config = (CONFIG if kind is LoraConfig else {"task_type": "SEQ_CLS"}) | config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = get_peft_model(model, kind(**config))
        for name, values in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(values, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def freeze(model: nn.Module) -> Any:
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    return model


@pytest.fixture
def other_folder(packed_folder: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A packed model with one bit that is another."""
    model = Auto.from_pretrained(packed_folder)
    next(iter(packed_layers(model).values())).weight.data[0, 0] ^= 1
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# --- which bits ------------------------------------------------------------------------------------------------------


METHODS = {
    "lora": (LoraConfig, {}),
    "ia3": (peft.IA3Config, {}),
    "prompts": (peft.PromptTuningConfig, {"num_virtual_tokens": 2}),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_on_other_bits_it_is_refused_and_both_are_named(
    method: str, packed_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    kind, config = METHODS[method]
    adapted(Auto.from_pretrained(packed_folder), kind, **config).save_pretrained(tmp_path / "adapter")
    other = Auto.from_pretrained(other_folder)
    both = rf"trained on the bits of '{packed_folder}'.*, and '{other_folder}' has others"
    with pytest.raises(ValueError, match=both):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    if method != "prompts":
        with pytest.raises(ValueError, match=both):
            Auto.from_pretrained(other_folder).load_adapter(str(tmp_path / "adapter"))
    second = adapted(Auto.from_pretrained(other_folder), kind, **config)
    with pytest.raises(ValueError, match=both):
        second.load_adapter(tmp_path / "adapter", "second")
    assert list(second.peft_config) == ["default"]
    PeftModel.from_pretrained(Auto.from_pretrained(packed_folder), tmp_path / "adapter")


def test_on_full_precision_it_is_refused(
    packed_folder: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    adapted(Auto.from_pretrained(packed_folder)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="a model without a name has none"):
        PeftModel.from_pretrained(tiny_model("bert", num_hidden_layers=1), tmp_path / "adapter")


def test_the_same_bits_in_another_shape_are_the_same_base(
    packed_folder: Path, frozen_bert: PreTrainedModel, tmp_path: Path
) -> None:
    adapted(Auto.from_pretrained(packed_folder)).save_pretrained(tmp_path / "adapter")
    for base in (
        Auto.from_pretrained(packed_folder, dtype=torch.bfloat16),
        Auto.from_pretrained(packed_folder).dequantize(),
        copy.deepcopy(frozen_bert),  # before it was packed
    ):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    base = Auto.from_pretrained(packed_folder)
    assert bits_of(base) == bits_of(base.base_model) == bits_of(adapted(base)) != bits_of(frozen_bert)


def test_one_config_makes_adapters_on_several_bases(packed_folder: Path, other_folder: Path) -> None:
    config = LoraConfig(**CONFIG)
    get_peft_model(Auto.from_pretrained(packed_folder), config)
    with pytest.warns(UserWarning, match="base_model_name_or_path"):  # PEFT's own, as ever
        get_peft_model(Auto.from_pretrained(other_folder), config)


def test_each_model_records_its_own_bits(packed_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(**CONFIG)
    bases = [Auto.from_pretrained(folder) for folder in (packed_folder, other_folder)]
    models = [get_peft_model(base, config) for base in bases]
    for base, model in zip(bases, models, strict=True):
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())[BITS] == bits_of(base)
        assert bits_of(base) in (tmp_path / "README.md").read_text()  # the card is written anew too
    base = Auto.from_pretrained(packed_folder)
    base.add_adapter(config)
    base.save_pretrained(tmp_path / "inside")
    assert json.loads((tmp_path / "inside" / "adapter_config.json").read_text())[BITS] == bits_of(base)


def test_a_saved_config_is_one_for_other_models_too(packed_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    adapted(Auto.from_pretrained(packed_folder)).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert BITS not in config.to_dict() and LoraConfig(**config.to_dict()) == config
    get_peft_model(Auto.from_pretrained(other_folder), config)


def test_without_this_package_the_config_loads_with_a_warning(packed_folder: Path, tmp_path: Path) -> None:
    adapted(Auto.from_pretrained(packed_folder)).save_pretrained(tmp_path)
    attributes = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.warns(UserWarning, match=BITS):
        assert LoraConfig.from_peft_type(**attributes).r == 2


def test_other_models_do_not_notice(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """Not even where a folder is called as the bases of others once were."""
    stock = adapted(tiny_model("bert"))
    stock.add_adapter("base", LoraConfig(**CONFIG))
    stock.save_pretrained(tmp_path)
    tiny_model("bert").save_pretrained(tmp_path / "latent_base")
    before = stock.get_base_model().bert.embeddings.word_embeddings.weight.clone()
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    loaded.load_adapter(tmp_path / "base", "base")
    assert torch.equal(loaded.get_base_model().bert.embeddings.word_embeddings.weight, before)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not any("stompp" in key for key in written) and "hf_stompp" not in (tmp_path / "README.md").read_text()
    assert pickle.loads(pickle.dumps(LoraConfig(**CONFIG))) == LoraConfig(**CONFIG)
    assert "hf_stompp" not in str(pickle.dumps(LoraConfig(**CONFIG)))


def test_a_model_without_memory_is_not_asked(packed_folder: Path) -> None:
    model = Auto.from_pretrained(packed_folder).to("meta")
    assert bits_of(get_peft_model(model, LoraConfig(**CONFIG))) is None


# --- bases that are trained ------------------------------------------------------------------------------------------


def test_without_adapters_is_the_base_around_the_same_tensors(
    packed_folder: Path, tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    base = Auto.from_pretrained(packed_folder)
    expected, names = logits(base, tiny_batch()), list(base.state_dict())
    model = adapted(base, modules_to_save=["classifier", "LayerNorm"])
    bare = without_adapters(model)
    assert list(bare.state_dict()) == names and torch.equal(logits(bare, tiny_batch()), expected)
    assert not any(isinstance(module, BaseTunerLayer) for module in bare.modules())
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() in ours for tensor in bare.state_dict().values())


def test_a_base_is_trained_with_its_adapter_and_packed_under_it(
    make_model: Callable[..., PreTrainedModel],
    make_trainer: Callable[..., Trainer],
    tiny_batch: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    latent = make_model(surrogate="ste", learn_activation_scale=False)
    before = {name: values.clone() for name, values in latent.named_parameters()}
    model = train_base(get_peft_model(latent, LoraConfig(**CONFIG)))
    frozen = {name for name, values in model.named_parameters() if not values.requires_grad}
    assert all("activation_scale" in name or "original_module" in name for name in frozen) and frozen
    make_trainer(model, callback=StomppCallback(), weight_decay=0.0).train()
    bare = without_adapters(model)
    for name, values in bare.named_parameters():
        kept = "activation_scale" in name or name.startswith("classifier") or "key.bias" in name
        assert kept or not torch.equal(values, before[name]), name

    packed = pack(model)
    assert not any("weight_mask" in name for name in packed.state_dict()) and len(packed_layers(packed)) == 6
    expected = logits(model.eval(), tiny_batch())
    assert torch.allclose(logits(packed, tiny_batch()), expected, atol=1e-5)
    assert torch.equal(logits(without_adapters(packed), tiny_batch()), logits(pack(bare), tiny_batch()))
    assert not torch.allclose(logits(pack(bare), tiny_batch()), expected, atol=1e-2)

    def fresh() -> PreTrainedModel:
        return make_model(surrogate="ste", learn_activation_scale=False)

    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    loaded = PeftModel.from_pretrained(fresh(), first)
    loaded.save_pretrained(second)  # what was loaded is not lost
    inside = fresh()
    inside.load_adapter(str(second))
    again = PeftModel.from_pretrained(Auto.from_pretrained(second / "latent_base"), second)
    for one in (loaded, PeftModel.from_pretrained(fresh(), second), inside, again):
        assert torch.equal(logits(one.eval(), tiny_batch()), expected)


def test_adapters_with_names_find_the_base_that_was_trained_with_them(
    make_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = train_base(get_peft_model(freeze(make_model()), LoraConfig(r=2, target_modules=["query"]), "side"))
    for values in model.parameters():
        values.data += 0.1 * torch.randn_like(values)
    expected = logits(model.eval(), tiny_batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "side", adapter_name="side")
    assert torch.equal(logits(loaded.eval(), tiny_batch()), expected)
    by_subfolder = PeftModel.from_pretrained(make_model(), str(tmp_path), subfolder="side")
    assert torch.equal(logits(by_subfolder.eval(), tiny_batch()), expected)
    other = get_peft_model(freeze(make_model()), LoraConfig(r=2, target_modules=["key"]))
    before = {name: values.clone() for name, values in other.state_dict().items()}
    with pytest.raises(ValueError, match="has other weights, under default. Load it on a model of its own"):
        other.load_adapter(tmp_path / "side", "side")
    assert all(torch.equal(values, before[name]) for name, values in other.state_dict().items())
    (tmp_path / "latent_base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="should be in .*latent_base.*, and is not there"):
        PeftModel.from_pretrained(make_model(), tmp_path / "side")


def test_an_adapter_that_was_trained_with_its_base_needs_that(
    make_model: Callable[..., PreTrainedModel], tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    train_base(adapted(make_model())).save_pretrained(tmp_path)
    whole = tiny_model("bert", num_hidden_layers=1)
    for load in (lambda: PeftModel.from_pretrained(whole, tmp_path), lambda: whole.load_adapter(str(tmp_path))):
        with pytest.raises(
            ValueError, match=r"trained with its base, which is in '.*_base', and a model without a name"
        ):
            load()
    assert not any(isinstance(module, BaseTunerLayer) for module in whole.modules())
    with pytest.raises(ValueError, match="train_base takes an adapter on a model that binarize"):
        train_base(adapted(tiny_model("bert")))


def test_several_adapters_are_packed_with_their_base(
    make_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model = adapted(freeze(make_model()), task_type=None)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    nn.init.normal_(
        model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").lora_B.second.weight
    )
    packed = pack(model)
    for name in ("default", "second"):
        model.set_adapter(name)
        packed.set_adapter(name)
        assert torch.allclose(logits(packed, tiny_batch()), logits(model, tiny_batch()), atol=1e-5), name


def test_several_active_adapters_stay_active(
    make_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    model = adapted(freeze(make_model()), task_type=None)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    packed = pack(model)
    assert packed.active_adapters == ["default", "second"]
    assert torch.allclose(logits(packed, tiny_batch()), logits(model.eval(), tiny_batch()), atol=1e-5)


def test_convolutions_are_packed_under_their_adapters(
    tiny_vision_model: Callable[..., Any], tiny_images: Callable[..., Tensor]
) -> None:
    """Whose inputs a folded batch norm would take away."""
    model = freeze(binarize(tiny_vision_model("resnet-18"), BinarizationConfig(surrogate="ste")))
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
    assert pack(model).config.quantization_config.folded
    convolutions = [name for name in binary_layers(model) if "layer" in name]
    model = adapted(model, target_modules=convolutions, task_type=None)
    packed, images = pack(model), tiny_images(model.get_base_model())
    assert not packed.config.quantization_config.folded
    with torch.no_grad():
        assert torch.allclose(packed(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)


def test_thresholds_that_took_batch_norms_in_pass_no_gradient(
    tiny_vision_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = freeze(binarize(tiny_vision_model("resnet-18"), BinarizationConfig(surrogate="ste")))
    folded, plain = pack(model), pack(model, fold_batch_norm=False)
    folded.save_pretrained(tmp_path)
    loaded = type(folded).from_pretrained(tmp_path)
    for one, expected in ((folded, 0.0), (loaded, 0.0), (plain, 2.0)):
        assert {layer.straight_through for layer in packed_layers(one).values()} == {expected}


def test_dequantized_convolutions_take_adapters(
    tiny_vision_model: Callable[..., Any], tiny_images: Callable[..., Tensor]
) -> None:
    packed = pack(freeze(binarize(tiny_vision_model("resnet-18"), BinarizationConfig())), fold_batch_norm=False)
    names = [name for name in packed_layers(packed) if "layer" in name]
    config = {"target_modules": names, "task_type": None}
    found = []
    for base in (copy.deepcopy(packed), packed.dequantize()):
        with torch.no_grad():
            found.append(adapted(base, **config)(tiny_images(base)).logits)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_a_base_that_would_be_saved_nowhere_is_not_trained(
    make_model: Callable[..., PreTrainedModel], make_trainer: Callable[..., Trainer], packed_folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"saved nowhere: call hf_stompp\.peft\.train_base\(model\)"):
        make_trainer(get_peft_model(make_model(), LoraConfig(**CONFIG)), callback=StomppCallback()).train()
    packed = get_peft_model(Auto.from_pretrained(packed_folder), LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="which is packed. To train an adapter on it, leave the callback out"):
        make_trainer(packed, callback=StomppCallback()).train()
    with pytest.raises(ValueError, match="this one has no adapter"):
        train_base(make_model())
    with pytest.raises(ValueError, match="unpack takes a model without adapters"):
        unpack(packed)


def test_biases_of_the_base_are_trained_by_one_adapter_alone(packed_folder: Path, tmp_path: Path) -> None:
    biases = {"target_modules": "dummy-target-modules", "bias": "all", "modules_to_save": ["LayerNorm"]}
    adapted(Auto.from_pretrained(packed_folder), **biases).save_pretrained(tmp_path / "biases")
    adapted(Auto.from_pretrained(packed_folder)).save_pretrained(tmp_path / "lora")
    for first, second in (("biases", "lora"), ("lora", "biases")):
        model = PeftModel.from_pretrained(Auto.from_pretrained(packed_folder), tmp_path / first)
        with pytest.raises(ValueError, match="has bias='all': it changes the biases of the base itself"):
            model.load_adapter(tmp_path / second, "second")
        assert list(model.peft_config) == ["default"]
    assert "norms and biases" in str(
        summary(PeftModel.from_pretrained(Auto.from_pretrained(packed_folder), tmp_path / "biases"))
    )


def test_what_cannot_be_loaded_is_named(packed_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Auto.from_pretrained(packed_folder)
    base.name_or_path = ""
    model = adapted(base)
    logging.enable_propagation()
    model.save_pretrained(tmp_path)
    assert "adapter_config.json names no base" in caplog.text
    other = get_peft_model(Auto.from_pretrained(packed_folder), LoraConfig(**CONFIG | {"r": 3}))
    with pytest.raises(ValueError, match=r"has the rank 2, and the model's has 3. Resume with the settings"):
        other.load_adapter(tmp_path, "default")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"The adapter in {tmp_path} is truncated or corrupted"):
        PeftModel.from_pretrained(Auto.from_pretrained(packed_folder), tmp_path)
    with pytest.raises(FileNotFoundError, match="is an adapter of PEFT, which has no config.json"):
        model_card(tmp_path)
    with pytest.raises(TypeError, match="adapter_card"):
        model_card(model)


def test_the_model_inside_is_not_packed_under_its_adapters(make_model: Callable[..., PreTrainedModel]) -> None:
    model = adapted(freeze(make_model()))
    with pytest.raises(ValueError, match="pack takes the PeftModel around it"):
        pack(model.get_base_model())


def test_the_summary_has_a_row_for_each_adapter(packed_folder: Path) -> None:
    base = Auto.from_pretrained(packed_folder)
    before = summary(base)
    model = adapted(base, modules_to_save=None)
    found = summary(model)
    assert found.rows[:-1] == before.rows and found.model == before.model
    row = found.rows[-1]
    trained = sum(values.numel() for values in model.parameters() if values.requires_grad)
    assert (row.name, row.role, row.parameters) == ("default", "adapter (LORA)", trained)
    assert "beside the bits" in str(found)
    model.delete_adapter("default")
    assert summary(model).rows == before.rows


@pytest.mark.parametrize("base", ["packed", "latent"])
def test_activation_checkpointing_gives_the_same_gradients(
    base: str, make_model: Callable[..., PreTrainedModel], tiny_batch: Callable[..., dict[str, Tensor]]
) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model: Any = freeze(make_model(surrogate="ste"))
        model = adapted(pack(model) if base == "packed" else model, lora_dropout=0.1)
        model = (train_base(model) if base == "latent" else model).train()
        if checkpointing:
            inside = model.get_base_model()
            enable = getattr(inside, "activation_checkpointing_enable", None) or inside.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        torch.manual_seed(0)  # dropout
        model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        found.append({name: values.grad for name, values in model.named_parameters() if values.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_an_adapter_in_bfloat16(
    packed_folder: Path, tiny_batch: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    base = Auto.from_pretrained(packed_folder)
    model = get_peft_model(base, LoraConfig(**CONFIG), autocast_adapter_dtype=False)
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data = nn.init.normal_(torch.empty_like(values), std=0.1).bfloat16()
    found = logits(model.eval(), tiny_batch())
    assert found.dtype == torch.float32
    for values in model.parameters():
        if values.dtype == torch.bfloat16:
            values.data = values.data.float()
    assert torch.allclose(found, logits(model, tiny_batch()), atol=0.1)


def test_gradients_reach_adapters_below_as_in_the_latent_model(
    make_model: Callable[..., PreTrainedModel],
    make_trainer: Callable[..., Trainer],
    tiny_batch: Callable[..., dict[str, Tensor]],
) -> None:
    latent = freeze(make_model(surrogate="ste"))
    packed = pack(latent)
    found = []
    for base in (latent, packed):
        model = adapted(base).eval()
        model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        found.append({name: values.grad for name, values in model.named_parameters() if "lora_A" in name})
    for name, gradient in found[0].items():
        assert gradient.any() and torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-6), name
    make_trainer(adapted(pack(freeze(make_model()))), callback=TrainerCallback(), max_steps=2).train()
