"""Selection on every architecture, against tables written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from image_model import ImageModel
from torch import Tensor, nn
from transformers import (
    BitConfig,
    BitForImageClassification,
    CLIPForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedModel,
    SiglipForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_stompp import BinarizationConfig
from hf_stompp.selection import LayerPlan, select
from hf_stompp.tracing import activations_feeding

ModelFactory = Callable[..., PreTrainedModel]

_SELF = ["attention.self.query", "attention.self.key", "attention.self.value"]
_BERT = [_SELF, ["attention.output.dense"], ["intermediate.dense"], ["output.dense"]]
_DISTILBERT = [
    ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    ["attention.out_lin"],
    ["ffn.lin1"],
    ["ffn.lin2"],
]
_ALBERT = [["attention.query", "attention.key", "attention.value"], ["attention.dense"], ["ffn"], ["ffn_output"]]
_DEBERTA_SHARED = [[f"{name}_proj" for name in _SELF], *_BERT[1:]]
_DEBERTA = [
    _DEBERTA_SHARED[0],
    ["attention.self.pos_key_proj", "attention.self.pos_query_proj"],
    *_DEBERTA_SHARED[1:],
]
ENCODERS: dict[str, tuple[str, list[str], list[list[str]]]] = {
    "bert": ("bert", ["encoder.layer.0", "encoder.layer.1"], _BERT),
    "minilm": ("bert", ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"], _BERT),
    "distilbert": ("distilbert", ["transformer.layer.0", "transformer.layer.1"], _DISTILBERT),
    "roberta": ("roberta", ["encoder.layer.0", "encoder.layer.1"], _BERT),
    "electra": ("electra", ["encoder.layer.0", "encoder.layer.1"], _BERT),
    # Its two layers are one and the same, run twice.
    "albert": ("albert", ["encoder.albert_layer_groups.0.albert_layers.0"], _ALBERT),
    "deberta-v2": ("deberta", ["encoder.layer.0", "encoder.layer.1"], _DEBERTA),
    "deberta-v2-shared": ("deberta", ["encoder.layer.0", "encoder.layer.1"], _DEBERTA_SHARED),
}
"""Architecture → name of the base model, its blocks, and the units of a block in execution order."""

_STEMS = {
    "electra": {"electra.embeddings_project": "stem"},
    "albert": {"albert.encoder.embedding_hidden_mapping_in": "stem"},
}
_CLASSIFIER = {"classifier": "head"}
_TWO_LAYERS = {"classifier.dense": "head", "classifier.out_proj": "head"}
_PREDICTIONS = {"cls.predictions.transform.dense": "head", "cls.predictions.decoder": "tied"}
_BERT_CLASSIFIER = {"bert.pooler.dense": "pooler"} | _CLASSIFIER
_DISTILBERT_CLASSIFIER = {"pre_classifier": "head"} | _CLASSIFIER
_DEBERTA_CLASSIFIER = {"pooler.dense": "pooler"} | _CLASSIFIER
KEPT: dict[str, dict[str, dict[str, str]]] = {
    "SequenceClassification": {
        "bert": _BERT_CLASSIFIER,
        "minilm": _BERT_CLASSIFIER,
        "distilbert": _DISTILBERT_CLASSIFIER,
        "roberta": _TWO_LAYERS,
        "electra": _TWO_LAYERS,
        "albert": {"albert.pooler": "pooler"} | _CLASSIFIER,
        "deberta-v2": _DEBERTA_CLASSIFIER,
        "deberta-v2-shared": _DEBERTA_CLASSIFIER,
    },
    "MaskedLM": {
        "bert": _PREDICTIONS,
        "minilm": _PREDICTIONS,
        "distilbert": {"vocab_transform": "head", "vocab_projector": "tied"},
        "roberta": {"lm_head.dense": "head", "lm_head.decoder": "tied"},
        "electra": {"generator_predictions.dense": "head", "generator_lm_head": "tied"},
        "albert": {"predictions.dense": "head", "predictions.decoder": "tied"},
        "deberta-v2": _PREDICTIONS,
        "deberta-v2-shared": _PREDICTIONS,
    },
    "TokenClassification": dict.fromkeys(ENCODERS, _CLASSIFIER),
    "MultipleChoice": {
        "bert": _BERT_CLASSIFIER,
        "minilm": _BERT_CLASSIFIER,
        "distilbert": _DISTILBERT_CLASSIFIER,
        "roberta": {"roberta.pooler.dense": "pooler"} | _CLASSIFIER,
        "electra": {"sequence_summary.summary": "head"} | _CLASSIFIER,
        "albert": {"albert.pooler": "pooler"} | _CLASSIFIER,
        "deberta-v2": _DEBERTA_CLASSIFIER,
        "deberta-v2-shared": _DEBERTA_CLASSIFIER,
    },
}
"""Head → architecture → the linears that stay in full precision, with their roles."""


TABLES = dict.fromkeys(ENCODERS, ("word", "position", "token_type")) | {
    "distilbert": ("word", "position"),
    "deberta-v2": ("word", "position"),
    "deberta-v2-shared": ("word", "position"),
}
"""Architecture → its embedding tables; DeBERTa's relative positions are looked up in no forward of a table."""


def tables(architecture: str) -> set[str]:
    base = ENCODERS[architecture][0].split(".")[0]
    return {f"{base}.embeddings.{name}_embeddings" for name in TABLES[architecture]}


def encoder_units(architecture: str) -> list[list[str]]:
    base, blocks, units = ENCODERS[architecture]
    return [[f"{base}.{block}.{name}" for name in unit] for block in blocks for unit in units]


def after_activation(architecture: str) -> list[str]:
    """The layers after the GELU: the second feed-forward one, which is the last of each block."""
    base, blocks, units = ENCODERS[architecture]
    return [f"{base}.{block}.{name}" for block in blocks for name in units[-1]]


def units_of(plans: list[LayerPlan]) -> list[list[str]]:
    """The names of the binarized layers by unit, in the order of the plans."""
    units: list[list[str]] = []
    for plan in plans:
        if plan.unit is not None:
            assert plan.unit in (len(units) - 1, len(units)), "plans are in execution order, units without gaps"
            if plan.unit == len(units):
                units.append([])
            units[plan.unit].append(plan.name)
    return units


@pytest.mark.parametrize("head", list(KEPT))
def test_units_roles_and_levels(architecture: str, head: str, tiny_model: ModelFactory) -> None:
    plans = select(tiny_model(architecture, head), BinarizationConfig())
    expected = encoder_units(architecture)
    assert units_of(plans) == expected
    kept = KEPT[head][architecture] | _STEMS.get(architecture, {})
    word = {name for name in tables(architecture) if "word" in name and head == "MaskedLM"}  # tied to the output layer
    kept |= dict.fromkeys(tables(architecture) - word, "embedding") | dict.fromkeys(word, "table")
    assert {plan.name: plan.role for plan in plans if plan.skipped} == kept
    assert all(plan.role == "encoder" for plan in plans if not plan.skipped)
    assert [plan.name for plan in plans if plan.unsigned] == after_activation(architecture)


def test_every_linear_and_table_of_the_model_has_one_plan(architecture: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(architecture, "MaskedLM")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [plan.name for plan in select(model, BinarizationConfig())]
    assert sorted(names) == sorted(linears | tables(architecture))


def test_tables_are_the_first_unit(architecture: str, tiny_model: ModelFactory) -> None:
    units = units_of(select(tiny_model(architecture), BinarizationConfig(embeddings=True)))
    assert set(units[0]) == tables(architecture)
    assert units[1:] == encoder_units(architecture)


def test_a_single_table(tiny_model: ModelFactory) -> None:
    word, position, kind = (f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type"))
    units = units_of(select(tiny_model("bert"), BinarizationConfig(include=["*.word_embeddings"])))
    assert units == [[word], *encoder_units("bert")]
    plans = select(tiny_model("bert"), BinarizationConfig(embeddings=True, exclude=["*.word_embeddings"]))
    assert set(units_of(plans)[0]) == {position, kind}
    assert {plan.name: plan.skipped for plan in plans}[word] == "exclude"


def test_a_tied_table_stays(tiny_model: ModelFactory) -> None:
    model, word = tiny_model("bert", "MaskedLM"), "bert.embeddings.word_embeddings"
    plans = {plan.name: plan for plan in select(model, BinarizationConfig(embeddings=True))}
    assert plans[word].unit is None and "tied" in plans[word].skipped
    with pytest.raises(ValueError, match=r"include selects 'bert.embeddings.word_embeddings'.* tied to another"):
        select(model, BinarizationConfig(include=[word]))


def test_the_order_is_that_of_a_real_forward(
    architecture: str, tiny_model: ModelFactory, tiny_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    model = tiny_model(architecture)
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**tiny_batch())
    selected = [plan.name for plan in select(model, BinarizationConfig()) if not plan.skipped]
    assert selected == [name for name in dict.fromkeys(called) if name in selected]


def test_keys_are_the_same_with_and_without_a_head(architecture: str, tiny_model: ModelFactory) -> None:
    keys = [
        {(plan.key, plan.unit) for plan in select(tiny_model(architecture, head), BinarizationConfig()) if plan.unit}
        for head in ("", "SequenceClassification", "MaskedLM")
    ]
    assert keys[0] == keys[1] == keys[2]
    base, blocks, units = ENCODERS[architecture]
    assert (f"{blocks[0]}.{units[1][0]}", 1) in keys[0]


@pytest.mark.parametrize(("activation", "unsigned"), [("gelu_new", True), ("relu", True), ("tanh", False)])
def test_levels_follow_the_activation_function(
    architecture: str, activation: str, unsigned: bool, tiny_model: ModelFactory
) -> None:
    field = "activation" if architecture == "distilbert" else "hidden_act"
    plans = select(tiny_model(architecture, **{field: activation}), BinarizationConfig())
    assert [plan.name for plan in plans if plan.unsigned] == (after_activation(architecture) if unsigned else [])


@pytest.mark.parametrize(("levels", "unsigned"), [("signed", False), ("unsigned", True)])
def test_levels_can_be_forced(levels: Any, unsigned: bool, tiny_model: ModelFactory) -> None:
    plans = select(tiny_model("bert"), BinarizationConfig(activation_levels=levels))
    assert all(plan.unsigned is unsigned for plan in plans if not plan.skipped)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_does_not_matter(implementation: str, tiny_model: ModelFactory) -> None:
    model = tiny_model("bert", attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    assert units_of(select(model, BinarizationConfig())) == encoder_units("bert")


@pytest.mark.parametrize("architecture", ["bert", "albert", "deberta-v2"])
def test_the_pooler_can_be_binarized(architecture: str, tiny_model: ModelFactory) -> None:
    plans = select(tiny_model(architecture), BinarizationConfig(pooler=True))
    units = units_of(plans)
    pooler = next(name for name, role in KEPT["SequenceClassification"][architecture].items() if role == "pooler")
    assert units == [*encoder_units(architecture), [pooler]]


@pytest.mark.parametrize("pattern", ["*.query", "encoder.layer.?.attention.self.query", "bert.*.self.query"])
def test_exclude_by_name_or_by_name_in_the_base_model(pattern: str, tiny_model: ModelFactory) -> None:
    plans = select(tiny_model("bert"), BinarizationConfig(exclude=[pattern]))
    expected = [[name for name in unit if not name.endswith("query")] for unit in encoder_units("bert")]
    assert units_of(plans) == expected
    excluded = {plan.name for plan in plans if plan.skipped == "exclude"}
    assert excluded == {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}


def test_units_have_no_gap_where_a_block_is_excluded(tiny_model: ModelFactory) -> None:
    plans = select(tiny_model("bert"), BinarizationConfig(exclude=["encoder.layer.0.*"]))
    assert units_of(plans) == encoder_units("bert")[4:]


def test_include_wins_over_the_role_and_over_exclude(tiny_model: ModelFactory) -> None:
    config = BinarizationConfig(include=["classifier", "*.0.*.query"], exclude=["*.query", "*.key"])
    units = units_of(select(tiny_model("bert"), config))
    assert units[0] == [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")]
    assert units[4] == ["bert.encoder.layer.1.attention.self.value"]
    assert units[-1] == ["classifier"]


def test_a_stem_can_be_included(tiny_model: ModelFactory) -> None:
    units = units_of(select(tiny_model("electra"), BinarizationConfig(include=["embeddings_project"])))
    assert units == [["electra.embeddings_project"], *encoder_units("electra")]


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(field: str, tiny_model: ModelFactory) -> None:
    config = BinarizationConfig(**{field: ["*.output.dense", "*.querry"]})
    with pytest.raises(ValueError, match=rf"BinarizationConfig\.{field} .*'\*\.querry'.* none of the 17 layers"):
        select(tiny_model("bert"), config)


def test_selecting_nothing_is_refused(tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match=r"selects none of the 17 layers and embedding tables of BertForSeq"):
        select(tiny_model("bert"), BinarizationConfig(exclude=["*"]))


@pytest.mark.parametrize("model_class", [GPT2Model, GPT2ForSequenceClassification])
def test_a_model_without_linear_layers_is_refused(model_class: type[PreTrainedModel]) -> None:
    model = model_class(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    with pytest.raises(ValueError, match=r"not what is made after them \(Conv1D\)"):
        select(model, BinarizationConfig())


@pytest.mark.parametrize(
    ("architecture", "decoder"), [("bert", "cls.predictions.decoder"), ("distilbert", "vocab_projector")]
)
def test_including_a_tied_layer_is_refused(architecture: str, decoder: str, tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match=rf"include selects '{decoder}', which cannot be binarized: .*tied"):
        select(tiny_model(architecture, "MaskedLM"), BinarizationConfig(include=[decoder]))


def test_an_untied_decoder_is_a_head(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert", "MaskedLM", tie_word_embeddings=False)
    config = BinarizationConfig(include=["cls.predictions.decoder"])
    plans = {plan.name: plan for plan in select(model, config)}
    assert plans["cls.predictions.decoder"].role == "head"
    assert plans["cls.predictions.decoder"].unit == 8


def test_a_layer_that_is_never_run_stays(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert")
    model.bert.spare = nn.Linear(32, 32)
    plans = {plan.name: plan for plan in select(model, BinarizationConfig())}
    assert (plans["bert.spare"].role, plans["bert.spare"].unit) == ("unused", None)
    with pytest.raises(ValueError, match=r"'bert\.spare', which cannot be binarized: not executed"):
        select(model, BinarizationConfig(include=["bert.spare"]))


def test_an_unknown_kind_of_input_is_refused(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert")
    model.main_input_name = "input_values"
    with pytest.raises(ValueError, match=r"BertForSequenceClassification takes 'input_values'"):
        select(model, BinarizationConfig())


def test_a_model_that_cannot_be_run_is_refused(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")

    def forward(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("needs real data")

    monkeypatch.setattr(type(model.bert.encoder), "forward", forward)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification could not be run .*needs real data"):
        select(model, BinarizationConfig())


def test_the_model_is_left_untouched(architecture: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(architecture).to(torch.bfloat16).train()
    model.classifier.eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules, modes = list(model.modules()), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    select(model, BinarizationConfig())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert after[name].device == value.device
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_on_the_meta_device_gives_the_same_plans(architecture: str, tiny_model: ModelFactory) -> None:
    config = BinarizationConfig()
    assert select(tiny_model(architecture).to("meta"), config) == select(tiny_model(architecture), config)


def test_activations_feeding_finds_the_gelu_before_a_layer(architecture: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(architecture)
    names = {name for unit in encoder_units(architecture) for name in unit}
    found = activations_feeding(model, names)
    _, blocks, _ = ENCODERS[architecture]
    assert len(found) == len(blocks)
    assert all("GELU" in type(model.get_submodule(name)).__name__ for name in found)
    assert activations_feeding(model, {encoder_units(architecture)[0][0]}) == []


def test_a_vision_transformer_has_no_tables() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes))
    plans = select(model, BinarizationConfig(embeddings=True))
    assert [plan.role for plan in plans if not plan.skipped] == ["encoder"] * 6


def test_a_table_is_a_weight(tiny_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="word_embeddings', which cannot be binarized: weights=False"):
        select(tiny_model("bert"), BinarizationConfig(weights=False, include=["*.word_embeddings"]))


def test_what_takes_constants_alone_is_kept() -> None:
    """Swin-v2 makes its position biases from coordinates, and reads the dtype of that layer's weight when it loads."""
    config = Swinv2Config(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    roles = {plan.name: plan.role for plan in select(Swinv2ForImageClassification(config), BinarizationConfig())}
    of_positions = {name: role for name, role in roles.items() if "continuous_position_bias_mlp" in name}
    assert len(of_positions) == 4 and set(of_positions.values()) == {"constant"}
    assert "constant" not in {role for name, role in roles.items() if name not in of_positions}


@pytest.mark.parametrize("kind", [CLIPForImageClassification, SiglipForImageClassification])
def test_a_vision_model_with_a_table_of_positions(kind: type[PreTrainedModel]) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind.config_class(vision_config={**vision, "image_size": 32, "patch_size": 16}, num_labels=3)
    roles = {plan.key: plan.role for plan in select(kind(config), BinarizationConfig())}
    assert [key for key, role in roles.items() if role == "table"] == ["vision_model.embeddings.position_embedding"]
    assert roles["vision_model.embeddings.patch_embedding"] == "stem"
    assert roles["vision_model.encoder.layers.0.mlp.fc1"] == "encoder"


class Residual(ImageModel):
    """A block as in a ResNet-D, whose shortcut takes the average of what the others take; then a head on averages."""

    def add_layers(self) -> None:
        self.stem = nn.Conv2d(3, 8, 3)
        self.one = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.down = nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(8, 8, 1)
        self.act, self.after = nn.ReLU(), nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.act(self.stem(pixel_values))
        x = self.act(self.two(self.act(self.one(x))) + self.down(self.pool(x)))
        return self.after(x.mean(dim=(2, 3)))


def test_a_shortcut_may_take_averages() -> None:
    plans = {plan.name: plan for plan in select(Residual(), BinarizationConfig())}
    roles = {name: plan.role for name, plan in plans.items()}
    assert roles == {"stem": "stem", "one": "encoder", "two": "encoder", "down": "shortcut", "after": "encoder"}
    assert plans["down"].unsigned and plans["after"].unsigned  # averages of what is not negative


def test_the_error_names_layers_that_are_no_plain_ones() -> None:
    model = BitForImageClassification(BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4))
    with pytest.raises(ValueError, match=r"not what is made after them \(WeightStandardizedConv2d\)\.$"):
        select(model, BinarizationConfig())


class Projection(nn.Linear):
    """A layer by what it has, not by its name."""


class LinearBlock(nn.Module):
    """A layer by its name alone: its weight is that of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(8)), Projection(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.weight


class Projected(ImageModel):
    def add_layers(self) -> None:
        self.block = LinearBlock()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.block(pixel_values.movedim(1, -1))


def test_the_error_goes_by_weights_and_not_by_names() -> None:
    with pytest.raises(ValueError, match=r"not what is made after them \(Projection\)\.$"):
        select(Projected(), BinarizationConfig())
