"""`BinarizationConfig`: what it refuses, and that it survives JSON, flags and other versions."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, HfArgumentParser, TrainingArguments

from hf_stompp import BinarizationConfig

NOT_DEFAULT = {
    "mode": "packed",
    "weights": True,
    "activations": True,
    "surrogate": "none",
    "progression": "layerwise",
    "order": "random",
    "curve": "cubic",
    "overlap": 2.5,
    "progression_start": 0.125,
    "progression_end": 0.75,
    "refresh": 0.3,
    "refresh_interval": 4,
    "scale": "tensor",
    "clip": 1.5,
    "clip_weights": False,
    "activation_levels": "signed",
    "learn_activation_scale": False,
    "learn_activation_shift": False,
    "replace_gelu": True,
    "replace_relu": True,
    "bireal_shortcuts": True,
    "attention": True,
    "pooler": True,
    "embeddings": True,
    "embedding_bits": 8,
    "include": ["a.*", "b"],
    "exclude": ["*.query"],
    "mask_seed": 17,
    "format_version": 1,
}
INIT_FIELDS = [item.name for item in dataclasses.fields(BinarizationConfig) if item.init]
STRINGS = ["mode", "surrogate", "progression", "order", "curve", "scale", "activation_levels"]
FLOATS = ["overlap", "progression_start", "progression_end", "refresh", "clip"]
INTS = ["refresh_interval", "mask_seed", "format_version", "embedding_bits"]
LISTS = ["include", "exclude"]
BOOLS = [
    "weights",
    "activations",
    "clip_weights",
    "learn_activation_scale",
    "learn_activation_shift",
    "replace_gelu",
    "replace_relu",
    "bireal_shortcuts",
    "attention",
    "pooler",
    "embeddings",
]
WRONG_TYPES = [
    *((name, value) for name in STRINGS for value in (1, None, True, ["channel"])),
    *((name, value) for name in FLOATS for value in ("1.0", [1.0], True)),
    *((name, None) for name in FLOATS if name != "clip"),
    *((name, value) for name in INTS for value in (1.0, "1", None, True)),
    *((name, value) for name in LISTS for value in ("a.*", None, [1], ("a",))),
    *((name, value) for name in BOOLS for value in (1, 0, "true", None)),
]
WRONG_VALUES = [
    *((name, "other") for name in STRINGS),
    ("overlap", 0.99),
    ("progression_start", -0.1),
    ("progression_start", 1.1),
    ("progression_end", -0.1),
    ("progression_end", 1.1),
    ("refresh", -0.1),
    ("refresh", 1.1),
    ("refresh_interval", 0),
    ("clip", 0.0),
    ("clip", -1.0),
    ("clip", -math.inf),
    ("mask_seed", -1),
    ("embedding_bits", 2),
    ("format_version", 0),
    *((name, math.nan) for name in FLOATS),
    *((name, math.inf) for name in FLOATS if name != "clip"),
]
WRONG_COMBINATIONS = {
    "nothing to binarize": ({"weights": False, "activations": False}, ["weights", "activations"]),
    "empty progression": (
        {"progression_start": 0.5, "progression_end": 0.5},
        ["progression_start", "progression_end", "0.5"],
    ),
    "backward progression": (
        {"progression": "global", "progression_start": 0.6, "progression_end": 0.5},
        ["progression_start", "0.6"],
    ),
    "order of what goes together": (
        {"progression": "global", "order": "reverse"},
        ["order", "'reverse'", "progression"],
    ),
    "overlap without windows": ({"progression": "none", "overlap": 2.0}, ["overlap", "2.0", "progression"]),
    "blockade": (
        {"progression": "none", "surrogate": "none", "weights": False},
        ["progression", "surrogate", '"ste"'],
    ),
    "never trained": ({"progression": "none", "surrogate": "none"}, ["progression", "surrogate", '"ste"']),
    "tables without weights": ({"embeddings": True, "weights": False}, ["embeddings", "weights"]),
    "attention without activations": ({"attention": True, "activations": False}, ["attention", "activations"]),
    "packed without weights": ({"mode": "packed", "weights": False}, ["mode", "weights"]),
    "levels without activations": (
        {"activations": False, "activation_levels": "signed"},
        ["activation_levels", "activations"],
    ),
}


def test_the_lists_above_cover_every_field() -> None:
    assert sorted(STRINGS + FLOATS + INTS + LISTS + BOOLS) == sorted(INIT_FIELDS) == sorted(NOT_DEFAULT)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda value: str(value))
def test_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"BinarizationConfig\.{name} is ") as error:
        BinarizationConfig(**{name: value})
    assert repr(value) in str(error.value)
    assert "allowed: " in str(error.value)


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda value: str(value))
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"BinarizationConfig\.{name} is ") as error:
        BinarizationConfig(**{name: value})
    assert str(value) in str(error.value)
    assert "allowed: " in str(error.value) or name == "format_version"


@pytest.mark.parametrize("name", STRINGS)
def test_an_unknown_choice_is_answered_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        BinarizationConfig(**{name: "other"})
    assert repr(getattr(BinarizationConfig(), name)) in str(error.value)
    assert repr(NOT_DEFAULT[name]) in str(error.value)


@pytest.mark.parametrize(("arguments", "named"), WRONG_COMBINATIONS.values(), ids=list(WRONG_COMBINATIONS))
def test_a_contradiction_is_refused_by_name(arguments: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError, match="BinarizationConfig") as error:
        BinarizationConfig(**arguments)
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize(
    "arguments",
    [
        {"surrogate": "ste", "progression": "none"},
        {"progression": "none", "progression_start": 1.0},
        {"progression": "none", "surrogate": "none", "progression_start": 0.2},
        {"progression": "global", "curve": "cosine"},
        {"activations": False},
        {"weights": False},
        {"progression_start": 0, "progression_end": 1},
        {"refresh": 0, "overlap": 1},
    ],
    ids=str,
)
def test_what_is_not_a_contradiction_is_accepted(arguments: dict[str, Any]) -> None:
    config = BinarizationConfig(**arguments)
    for name, value in arguments.items():
        assert getattr(config, name) == value
        if name in FLOATS:
            assert isinstance(getattr(config, name), float), "JSON must not depend on how a number was written"


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="clipp"):
        BinarizationConfig(clipp=1.0)


def test_infinite_clip_is_none() -> None:
    assert BinarizationConfig(clip=math.inf).clip is None
    assert BinarizationConfig(clip=None).clip is None


def test_lists_are_not_shared_between_configs() -> None:
    BinarizationConfig().include.append("a")
    assert BinarizationConfig().include == []


def test_every_flag_has_help() -> None:
    for item in dataclasses.fields(BinarizationConfig):
        if item.init:
            assert len(item.metadata["help"]) > 10, item.name


def flags(values: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *value]
        else:
            words += [f"--{name}", str(value)]
    return words


def test_every_field_is_a_flag() -> None:
    (config,) = HfArgumentParser(BinarizationConfig).parse_args_into_dataclasses(flags(NOT_DEFAULT))
    assert config == BinarizationConfig(**NOT_DEFAULT)
    for name in INIT_FIELDS:
        assert getattr(config, name) == NOT_DEFAULT[name]
        assert type(getattr(config, name)) is type(NOT_DEFAULT[name])


def test_without_flags_the_parser_gives_the_defaults() -> None:
    assert HfArgumentParser(BinarizationConfig).parse_args_into_dataclasses([]) == (BinarizationConfig(),)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--clip", "inf"], "clip", None),
        (["--no_activations"], "activations", False),
        (["--replace_gelu"], "replace_gelu", True),
        (["--replace_relu"], "replace_relu", True),
        (["--bireal_shortcuts"], "bireal_shortcuts", True),
        (["--include", "a", "b"], "include", ["a", "b"]),
    ],
    ids=["clip", "no_activations", "replace_gelu", "replace_relu", "bireal_shortcuts", "include"],
)
def test_flags_that_are_written_in_another_way(words: list[str], name: str, value: Any) -> None:
    (config,) = HfArgumentParser(BinarizationConfig).parse_args_into_dataclasses(words)
    assert getattr(config, name) == value


def test_a_wrong_flag_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(BinarizationConfig).parse_args_into_dataclasses(["--curve", "square"])
    message = capsys.readouterr().err
    assert "--curve" in message
    assert "cosine" in message


def test_flags_stand_beside_those_of_the_trainer(tmp_path: Path) -> None:
    # argparse refuses the same flag twice.
    parser = HfArgumentParser((BinarizationConfig, TrainingArguments))
    text = parser.format_help()
    assert all(f"--{name}" in text for name in INIT_FIELDS)
    words = ["--output_dir", str(tmp_path), "--curve", "cosine", "--max_steps", "7", "--mask_seed", "3", "--seed", "4"]
    config, args = parser.parse_args_into_dataclasses(words)
    assert (config.curve, config.mask_seed) == ("cosine", 3)
    assert (args.max_steps, args.seed) == (7, 4)


def filled_config() -> BinarizationConfig:
    config = BinarizationConfig(**NOT_DEFAULT)
    config.modules = {"encoder.layer.0": {"unit": 0, "levels": "signed"}}
    config.folded = ["encoder.norm.0"]
    return config


def test_json_round_trip_keeps_every_field() -> None:
    config = filled_config()
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = BinarizationConfig.from_dict(values)
    assert again == config
    assert again.to_dict() == config.to_dict() == values
    assert values.items() >= NOT_DEFAULT.items()
    assert values["quant_method"] == "stompp"
    assert values["modules"] == config.modules
    assert values["folded"] == config.folded


def test_no_clip_survives_json() -> None:
    config = BinarizationConfig(clip=math.inf)
    assert BinarizationConfig.from_dict(json.loads(config.to_json_string())).clip is None


def test_it_is_a_dict_of_its_fields() -> None:
    config = filled_config()
    assert dict(config) == config.to_dict()
    assert set(dict(config)) == set(INIT_FIELDS) | {"quant_method", "modules", "folded"}


def test_to_dict_is_a_copy() -> None:
    config = filled_config()
    config.to_dict()["include"].append("x")
    config.to_dict()["modules"].clear()
    config.to_dict()["folded"].clear()
    assert config == filled_config()


def test_the_settings_are_what_was_chosen_alone() -> None:
    settings = filled_config().settings()
    assert settings.keys() == set(INIT_FIELDS) | {"quant_method"}
    assert BinarizationConfig.from_dict(settings) == BinarizationConfig(**NOT_DEFAULT)


def test_it_survives_in_the_config_of_a_model(tmp_path: Path) -> None:
    model_config = BertConfig(hidden_size=32, num_attention_heads=2)
    model_config.quantization_config = filled_config()
    model_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert BinarizationConfig.from_dict(saved) == filled_config()


def test_keys_of_a_newer_version_are_kept_with_a_warning() -> None:
    values = filled_config().to_dict() | {"dithering": {"a": [1]}, "blur": None}
    with pytest.warns(UserWarning, match=r"\['blur', 'dithering'\].*upgrade"):
        config = BinarizationConfig.from_dict(values)
    assert config.to_dict() == values
    assert config.unknown == {"dithering": {"a": [1]}, "blur": None}


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format_version is 2, .* up to 1; upgrade"):
        BinarizationConfig.from_dict(BinarizationConfig().to_dict() | {"format_version": 2})


def test_wrong_values_in_a_file_are_refused() -> None:
    with pytest.raises(ValueError, match=r"BinarizationConfig\.curve is 'square'"):
        BinarizationConfig.from_dict(BinarizationConfig().to_dict() | {"curve": "square"})


def test_keyword_arguments_win_over_the_file_and_are_checked() -> None:
    values = BinarizationConfig().to_dict()
    config, unused = BinarizationConfig.from_dict(values, return_unused_kwargs=True, curve="cosine", device_map="cpu")
    assert config == BinarizationConfig(curve="cosine")
    assert unused == {"device_map": "cpu"}
    with pytest.raises(ValueError, match=r"BinarizationConfig\.curve is 'square'"):
        BinarizationConfig.from_dict(values, curve="square")


def test_the_default_is_stompp_on_weights_and_activations() -> None:
    config = BinarizationConfig()
    assert (config.weights, config.activations) == (True, True)
    assert (config.progression, config.order) == ("layerwise", "forward")
    assert not config.never_freezes


def test_presets() -> None:
    assert BinarizationConfig.preset("resnet-w1a1") == BinarizationConfig()
    bert = BinarizationConfig.preset("bert-w1a1", pooler=True)
    assert (bert.replace_gelu, bert.activations, bert.pooler, bert.surrogate) == (True, True, True, "ste")
    weights = BinarizationConfig.preset("weights-only")
    assert weights.weights and not weights.activations
    baseline = BinarizationConfig.preset("ste-baseline")
    assert list(baseline.unit_fractions(1, 100, 3)) == [1.0, 1.0, 1.0] and baseline.surrogate == "ste"
    bit = BinarizationConfig.preset("bit-like")
    assert (bit.progression, bit.scale, bit.weight_clip, bit.clip) == ("none", "tensor", None, 1.0)
    bibert = BinarizationConfig.preset("bibert-like", attention=True)
    assert (bibert.activation_levels, bibert.learn_activation_shift, bibert.attention) == ("signed", False, True)
    assert BinarizationConfig.preset("weights-only", activations=True) == BinarizationConfig()  # a change wins


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preset: received 'bert'; allowed: bert-w1a1, resnet-w1a1"):
        BinarizationConfig.preset("bert")


def test_misspelt_fields_of_presets_are_refused() -> None:
    with pytest.raises(TypeError, match=r"preset: received 'overlapp'; allowed: .*overlap, progression_start"):
        BinarizationConfig.preset("bert-w1a1", overlapp=2)
