"""1-bit attention: its formula in numpy, its units, its gradients, its packed copy, and which models it takes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_stompp import (
    BinarizationConfig,
    StomppCallback,
    binarize,
    calibrate,
    model_card,
    pack,
    summary,
    unpack,
    verify,
)
from hf_stompp.attention import IMPLEMENTATION, attend
from hf_stompp.fusion import fuse
from hf_stompp.layers import BinaryActivation, FloatActivation
from hf_stompp.patching import binary_layers, bits_of, packed_activations

HEADS, WIDTH = 2, 4
NAMES = ("queries", "keys", "values", "probabilities")
SHAPE: dict[str, Any] = dict(
    vocab_size=50, hidden_size=HEADS * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=16,
    max_position_embeddings=16, initializer_range=0.5,
)  # fmt: skip
LISTED = "encoder.layer.{}.attention.self.binary_attention.{}"


def bert(**config: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**(SHAPE | config))).eval()


def batch(length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, 4:] = mask[2, 2:] = 0
    return {"input_ids": torch.randint(1, 50, (3, length), generator=generator), "attention_mask": mask}


def one_bit(model: Any = None, fraction: float = 1.0, **config: Any) -> Any:
    """Binarized, calibrated, and frozen to a fraction, its shifts off their starting values."""
    model = binarize(model or bert(), BinarizationConfig(attention=True, **config))
    calibrate(model, batch())
    generator = torch.Generator().manual_seed(2)
    for layer in binary_layers(model).values():
        if isinstance(layer, BinaryActivation) and layer.activation_shift is not None:
            torch.nn.init.normal_(layer.activation_shift, std=0.2, generator=generator)
        layer.set_frozen(fraction, step=1)
    return model.eval()


def of_numpy(latent: BinaryActivation, x: np.ndarray) -> np.ndarray:
    """x̂ of a tensor `[B, heads, S, n]`, by the formula, in float64."""
    shape, gamma = (HEADS, 1, -1), latent.activation_scale.item()  # type: ignore[union-attr]
    frozen, reach = latent.activation_mask.numpy().reshape(shape), 2 * gamma
    if latent.unsigned:
        return np.where(frozen, gamma * (x >= gamma / 2), np.clip(x, 0, reach))
    if latent.activation_shift is not None:
        x = x - latent.activation_shift.detach().double().numpy().reshape(shape)
    return np.where(frozen, np.where(x >= 0, gamma, -gamma), np.clip(x, -reach, reach))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_attention_is_its_formula(fraction: float) -> None:
    model = one_bit(fraction=fraction)
    module = model.bert.encoder.layer[0].attention.self
    q, k, v = torch.randn(3, 2, HEADS, 5, WIDTH, generator=torch.Generator().manual_seed(4)).unbind()
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = torch.finfo(torch.float32).min
    found, probabilities = attend(module, q, k, v, mask, scaling=0.7)

    places = module.binary_attention
    ours = {
        name: of_numpy(getattr(places, name), t.double().numpy()) for name, t in zip(NAMES, (q, k, v), strict=False)
    }
    scores = 0.7 * ours["queries"] @ ours["keys"].swapaxes(2, 3) + mask.double().numpy()
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    soft = powers / powers.sum(-1, keepdims=True)
    hard = of_numpy(places.probabilities, soft)
    np.testing.assert_allclose(probabilities.detach().numpy(), hard, atol=1e-6)
    np.testing.assert_allclose(found.detach().numpy(), (hard @ ours["values"]).swapaxes(1, 2), atol=1e-5)
    if fraction == 1.0:  # two levels each, and what is padding takes no part
        assert len(np.unique(hard)) == 2 and (hard[1, ..., 3:] == 0).all()


def test_with_nothing_frozen_and_no_clip_it_is_the_model_it_was() -> None:
    model = bert()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch()).logits
        found = binarize(model, BinarizationConfig(attention=True, clip=None))(**batch()).logits
    assert torch.equal(found, expected)


def test_the_tensors_of_an_attention_are_a_unit_between_its_layers() -> None:
    modules = binarize(bert(), BinarizationConfig(attention=True)).config.quantization_config.modules
    unit = {key: entry["unit"] for key, entry in modules.items()}
    for i in range(2):
        (tensors,) = {unit[LISTED.format(i, name)] for name in NAMES}
        assert unit[f"encoder.layer.{i}.attention.self.query"] == tensors - 1
        assert unit[f"encoder.layer.{i}.attention.output.dense"] == tensors + 1
    assert set(unit.values()) == set(range(10))


@pytest.mark.parametrize("levels", ["auto", "signed", "unsigned"])
def test_probabilities_alone_are_unsigned(levels: Any) -> None:
    config = BinarizationConfig(attention=True, activation_levels=levels)
    modules = binarize(bert(), config).config.quantization_config.modules
    found = [modules[LISTED.format(0, name)]["levels"] for name in NAMES]
    assert found == ["signed", "signed", "signed", "unsigned"]


def test_what_is_excluded_stays_in_floats() -> None:
    config = BinarizationConfig(attention=True, exclude=["*.probabilities"])
    model = one_bit(exclude=config.exclude)
    places = [m for m in model.modules() if isinstance(m, FloatActivation)]
    assert len(places) == 2 and all(place.shape == (HEADS, 1, 1) for place in places)
    assert len(packed_activations(pack(model))) == 6


@pytest.mark.parametrize("surrogate", ["ste", "none"])
def test_frozen_tensors_pass_gradients_with_ste_alone(surrogate: str) -> None:
    model = one_bit(surrogate=surrogate)
    x = torch.randn(1, HEADS, 3, WIDTH, requires_grad=True)
    places = model.bert.encoder.layer[0].attention.self.binary_attention
    places.queries(x).sum().backward()
    latent = places.queries
    shift = latent.activation_shift.detach().view(HEADS, 1, WIDTH)
    inside = ((x.detach() - shift).abs() <= 2 * latent.activation_scale.item()).float()
    assert torch.equal(x.grad, inside if surrogate == "ste" else torch.zeros_like(x))
    signs = torch.where(x.detach() - shift >= 0, 1.0, -1.0)
    assert latent.activation_scale.grad.item() == pytest.approx(signs.sum().item())  # of all frozen entries
    expected = -inside.sum(dim=(0, 2)).flatten() if surrogate == "ste" else torch.zeros(HEADS * WIDTH)
    assert torch.equal(latent.activation_shift.grad, expected)


def test_calibration_leaves_padding_out() -> None:
    model = binarize(bert(), BinarizationConfig(attention=True))
    seen: list[Tensor] = []
    places = model.bert.encoder.layer[0].attention.self.binary_attention
    places.values.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calibrate(model, batch())
    values = seen[0].transpose(1, 2)[batch()["attention_mask"].bool()]
    assert places.values.activation_scale.item() == pytest.approx(values.abs().mean().item(), rel=1e-6)


def test_packed_loaded_and_unpacked_it_computes_the_same(tmp_path: Path) -> None:
    model = one_bit()
    packed = pack(model)
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = [each.eval()(**batch()).logits for each in (model, packed, loaded, unpack(packed))]
    assert torch.equal(logits[1], logits[2])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-6)
    assert len(packed_activations(loaded)) == 8 and verify(tmp_path).ok
    assert bits_of(loaded) == bits_of(packed)
    loaded.bert.encoder.layer[1].attention.self.binary_attention.keys.activation_threshold[0] += 1
    assert bits_of(loaded) != bits_of(packed)


def test_a_latent_checkpoint_loads_as_it_was(tmp_path: Path) -> None:
    model = one_bit(fraction=0.4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("fault", ["missing", "infinite", "levels"])
def test_a_checkpoint_without_sound_thresholds_is_refused(fault: str, tmp_path: Path) -> None:
    pack(one_bit()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert." + LISTED.format(1, "keys")
    if fault == "missing":
        del tensors[f"{name}.activation_threshold"]
    elif fault == "infinite":
        tensors[f"{name}.activation_threshold"][0] = torch.inf
    else:
        tensors[f"{name}.activation_levels"][0] = 0.1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"binary_attention\.keys"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not verify(tmp_path).ok


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not set": lambda config: config.update(attention=False),
    "one is not listed": lambda config: config["modules"].pop(LISTED.format(1, "keys")),
    "none is listed": lambda config: [config["modules"].pop(LISTED.format(i, n)) for i in range(2) for n in NAMES],
    "another layer": lambda config: config["modules"].update(
        {LISTED.format(7, "keys"): config["modules"].pop(LISTED.format(1, "keys"))}
    ),
    "features": lambda config: config["modules"][LISTED.format(1, "keys")].update(features=4),
    "levels": lambda config: config["modules"][LISTED.format(1, "keys")].update(levels=None),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_a_config_that_tells_another_attention_is_refused(edit: str, tmp_path: Path) -> None:
    pack(one_bit()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    EDITS[edit](config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization_config\.modules .*(corrupted|of another model)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not verify(tmp_path).ok


def test_attention_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="selects none of the"):
        binarize(bert(), BinarizationConfig(attention=True, exclude=["*.dense", "*.self.query", "*.key", "*.value"]))


def test_it_trains_to_the_end_and_packs(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.randint(1, 50, (6,)).tolist(), "labels": i % 2} for i in range(16)]
    model = binarize(bert(), BinarizationConfig(attention=True, surrogate="none"))
    args = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=5,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[StomppCallback()])
    trainer.train()
    assert all(layer.fraction == 1.0 for layer in binary_layers(model).values())
    logs = [log for log in trainer.state.log_history if "unit_flips" in log]
    assert len(logs) == 6 and all(len(log["unit_flips"]) == 10 for log in logs)
    with torch.no_grad():
        torch.testing.assert_close(pack(model)(**batch()).logits, model.eval()(**batch()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_implementation_is_refused(implementation: str) -> None:
    latent = one_bit()
    packed = pack(latent)
    message = rf"BertSelfAttention .* set to '{implementation}'.*set_attn_implementation\('{IMPLEMENTATION}'\)"
    for model in (latent, packed):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match=message):
            model(**batch())
        model.set_attn_implementation(IMPLEMENTATION)
        model(**batch())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", IMPLEMENTATION, None])
def test_whatever_is_asked_for_in_loading_it_attends_in_bits(implementation: str | None, tmp_path: Path) -> None:
    for model, folder in ((one_bit(), "latent"), (pack(one_bit()), "packed")):
        model.save_pretrained(tmp_path / folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / folder, attn_implementation=implementation
        )
        with torch.no_grad():
            assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_models_that_are_looked_at_meanwhile_do_not_disturb() -> None:
    """Tracing must not change what another thread's model attends by."""
    serving, found = pack(one_bit()), []
    with torch.no_grad():
        expected = serving(**batch()).logits

    def serve(*_: Any) -> None:
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            found.append(serving(**batch()).logits)

    other = bert()
    other.bert.encoder.layer[1].attention.self.register_forward_pre_hook(serve)
    summary(other, BinarizationConfig(attention=True))
    assert len(found) >= 2 and all(torch.equal(logits, expected) for logits in found)


def test_dropout_leaves_thresholds_alone() -> None:
    module = one_bit(bert(attention_probs_dropout_prob=0.5)).bert.encoder.layer[0].attention.self
    q, k, v = torch.randn(3, 8, HEADS, 16, WIDTH, generator=torch.Generator().manual_seed(4)).unbind()
    with torch.no_grad():
        module.binary_attention.probabilities.activation_scale.fill_(0.15)
        _, evaluated = attend(module, q, k, v, None, dropout=0.5)
        _, trained = attend(module.train(), q, k, v, None, dropout=0.5)
    ones = evaluated > 0
    assert 0.2 < ones.float().mean() < 0.5
    assert not (trained > 0)[~ones].any()
    kept = trained[ones] > 0
    assert 0.4 < kept.float().mean() < 0.6 and torch.allclose(trained[ones][kept], torch.tensor(0.3))


def test_a_row_that_is_all_padding_makes_numbers() -> None:
    inputs = batch()
    inputs["attention_mask"][2] = 0
    with torch.no_grad():
        assert pack(one_bit())(**inputs).logits.isfinite().all()


def test_with_and_without_a_head(tmp_path: Path) -> None:
    packed = pack(one_bit())
    packed.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        expected = packed.bert(**batch()).last_hidden_state
        assert torch.equal(base(**batch()).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(again.bert(**batch()).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_decides_on_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    packed = pack(one_bit())
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    for name, activation in packed_activations(loaded).items():
        ours = packed_activations(packed)[name]
        assert activation.activation_threshold.dtype == torch.float32
        assert torch.equal(activation.activation_threshold, ours.activation_threshold)
    assert loaded(**batch()).logits.dtype == dtype


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = one_bit(fraction=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("binary_attention" in name and grad.any() for name, grad in found[0].items())
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_it_is_compiled_exported_dequantized_and_fused() -> None:
    packed, inputs = pack(one_bit()), batch()
    with torch.no_grad():
        expected = packed(**inputs).logits
        exported = torch.export.export(packed, (), inputs).module()(**inputs).logits
        compiled = torch.compile(packed, backend="eager", fullgraph=True)(**inputs).logits
        torch._dynamo.reset()
        fused = copy.deepcopy(packed)
        fuse(fused)
        others = [exported, compiled, fused(**inputs).logits, copy.deepcopy(packed).dequantize()(**inputs).logits]
    for logits in others:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ["query", "value"], "all-linear"])
def test_adapters_find_the_layers(targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    packed = pack(one_bit())
    adapted = peft.get_peft_model(packed, peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    adapted(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    lowest = [p.grad for name, p in adapted.named_parameters() if "layer.0.attention.self.query.lora_A" in name]
    assert lowest and all(grad.any() for grad in lowest)  # through all that is binary above


FAMILIES = {
    "RoBERTa": lambda: RobertaForSequenceClassification(RobertaConfig(**(SHAPE | {"max_position_embeddings": 20}))),
    "DistilBERT": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
    ),
    "ViT": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_families(family: str) -> None:
    model = binarize(FAMILIES[family]().eval(), BinarizationConfig(attention=True))
    inputs: Any = {"pixel_values": torch.randn(2, 3, 8, 8)} if family == "ViT" else batch()
    calibrate(model, inputs)
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    with torch.no_grad():
        torch.testing.assert_close(pack(model)(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=1e-5)
    assert len(packed_activations(pack(model))) == 8


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SHAPE))
    with pytest.raises(ValueError, match="no attention of DebertaV2ForSequenceClassification asks transformers"):
        binarize(model, BinarizationConfig(attention=True))


def test_scores_that_are_changed_otherwise_are_refused() -> None:
    module, tensor = bert().bert.encoder.layer[0].attention.self, torch.zeros(1, HEADS, 2, WIDTH)
    with pytest.raises(ValueError, match="BertSelfAttention gives its attention softcap"):
        attend(module, tensor, tensor, tensor, None, softcap=30.0)


def test_fewer_heads_of_keys_and_values_are_repeated() -> None:
    module = bert().bert.encoder.layer[0].attention.self
    q, kv = torch.randn(1, 4, 3, WIDTH), torch.randn(1, 2, 3, WIDTH)
    repeated = kv[:, [0, 0, 1, 1]]
    assert torch.equal(attend(module, q, kv, kv, None)[0], attend(module, q, repeated, repeated, None)[0])


CONTRACTS: dict[str, tuple[dict[str, Any], str]] = {
    "all": ({"attention": True, "pooler": True, "embeddings": True}, "fully binary"),
    "positions apart": (
        {"attention": True, "pooler": True, "embeddings": True, "exclude": ["*position*", "*token_type*"]},
        "fully binary",
    ),
    "no pooler": ({"attention": True, "embeddings": True}, "linears only"),
    "no embeddings": ({"attention": True, "pooler": True}, "linears only"),
    "part of attention": (
        {"attention": True, "pooler": True, "embeddings": True, "exclude": ["*.probabilities"]},
        "linears only",
    ),
    "layers": ({}, "linears only"),
    "weights": ({"activations": False}, "weights only"),
    "inputs": ({"weights": False}, "inputs only"),
    "some layers": ({"exclude": ["*.query"]}, "in part"),
}


@pytest.mark.parametrize("case", list(CONTRACTS))
def test_summary_tells_the_contract(case: str) -> None:
    settings, contract = CONTRACTS[case]
    model = binarize(bert(), BinarizationConfig(**settings))
    assert summary(model).contract == contract
    if not settings.get("weights", True):  # which is not packed
        return
    calibrate(model, batch())
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    packed = pack(model)
    assert summary(model).contract == summary(packed).contract == contract
    assert f"BertForSequenceClassification: {contract}; " in str(summary(packed))
    card = model_card(packed).content
    assert f"(W1A{1 if settings.get('activations', True) else 32}, {contract})" in card
    assert ("; what attention multiplies is 1-bit" in card) == settings.get("attention", False)
    size = sum(t.nbytes for t in packed.state_dict().values())
    assert summary(packed).packed_bytes == size == summary(model).packed_bytes


WHOLE = BinarizationConfig(attention=True, pooler=True, embeddings=True)
OTHERS: dict[str, tuple[Callable[[], Any], BinarizationConfig, str]] = {
    "tied word embeddings": (lambda: BertForMaskedLM(BertConfig(**SHAPE)), WHOLE, "linears only"),
    "tables of another name": (
        lambda: ModernBertForSequenceClassification(ModernBertConfig(**SHAPE, pad_token_id=0)),
        BinarizationConfig(attention=True),
        "linears only",
    ),
    "cross-attention that is not run": (
        lambda: BertForSequenceClassification(BertConfig(**SHAPE, is_decoder=True, add_cross_attention=True)),
        WHOLE,
        "in part",
    ),
    "an image model": (FAMILIES["ViT"], BinarizationConfig(), "linears only"),
    "an image model and its attention": (FAMILIES["ViT"], BinarizationConfig(attention=True), "fully binary"),
    "nothing": (bert, BinarizationConfig(exclude=["*encoder*"], embeddings=True), "full precision"),
}


@pytest.mark.parametrize("case", list(OTHERS))
def test_the_contract_of_other_models(case: str) -> None:
    make, config, contract = OTHERS[case]
    assert summary(make(), config).contract == contract


def test_summary_plans_it_for_a_model_that_is_not_binarized() -> None:
    model, config = bert(), BinarizationConfig(attention=True, pooler=True, embeddings=True)
    planned = summary(model, config)
    assert planned.contract == "fully binary"
    assert [row.name for row in planned.rows if row.role == "attention"] == [
        "bert." + LISTED.format(i, name) for i in range(2) for name in NAMES
    ]
    assert model.config._attn_implementation != IMPLEMENTATION and not any(
        isinstance(module, FloatActivation) for module in model.modules()
    )


def test_a_copy_has_the_tensors_of_its_own() -> None:
    model = one_bit()
    other = copy.deepcopy(model)
    other.bert.encoder.layer[0].attention.self.binary_attention.keys.activation_scale.data += 1
    with torch.no_grad():
        assert not torch.equal(other(**batch()).logits, model(**batch()).logits)
