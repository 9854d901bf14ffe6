"""The flags of a recipe: a YAML file, then flags over it, into dataclasses and back."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe(argv: Sequence[str], dataclass_types: Iterable[type]) -> tuple[Any, ...]:
    """Parse `[recipe.yaml] --flag value …` into one object of each dataclass; a flag overrides the file's key.

    The YAML keys are the flags' names and go through the same parser, so that a value of the wrong type or outside its
    choices is refused alike; `null` sets `None`.

    Raises:
        FileNotFoundError: there is no such YAML file.
        ValueError: it is not a flat mapping, or one of its keys, or a flag, is unknown.

    Example:

        >>> (args,) = parse_recipe(["--learning_rate", "1e-3"], [TrainingArguments])
        >>> args.learning_rate
        0.001
    """
    parser, words = _parser(argv, dataclass_types)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        raise ValueError(
            f"{unknown[0]} is not a flag of this recipe. {hint(unknown[0].lstrip('-').split('=')[0], known)}"
        )
    return tuple(parsed)


def given_flags(argv: Sequence[str], dataclass_types: Iterable[type]) -> dict[str, Any]:
    """What `[recipe.yaml] --flag value …` sets otherwise than it is by default, as the content of a YAML file.

    Example:

        >>> given_flags(["--learning-rate", "1e-3", "--seed=42"], [TrainingArguments])
        {'learning_rate': 0.001}
    """
    parser, words = _parser(argv, dataclass_types)
    defaults = vars(HfArgumentParser(dataclass_types).parse_args([]))
    return {name: value for name, value in vars(parser.parse_args(words)).items() if value != defaults[name]}


def _parser(argv: Sequence[str], dataclass_types: Iterable[type]) -> tuple[Any, list[str]]:
    """A parser, and all words for it: those that the YAML file stands for come first."""
    parser = HfArgumentParser(dataclass_types)
    from_file: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = _read_yaml(Path(argv[0]), parser.dataclass_types)
        argv = argv[1:]
        parser.set_defaults(**{key: None for key, value in values.items() if value is None})
        for key, value in values.items():
            from_file += as_flags(key, value)
    return parser, [*from_file, *argv]


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; what is none is an error that names the file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: it is no YAML ({' '.join(str(error).split())}).") from error


def _read_yaml(path: Path, dataclass_types: Iterable[type]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"recipe: there is no file {str(path)!r}. Pass one of recipes/configs, or flags only.")
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: received {values!r}; a recipe is a flat mapping of flags, `learning_rate: 1e-4`.")
    check_keys(path, values, dataclass_types)
    return values


def check_keys(where: Any, values: Iterable[Any], dataclass_types: Iterable[type]) -> None:
    """Refuses what is not the name of a flag, and says where it is.

    Example:

        >>> check_keys("recipe.yaml", {"learning_rate": 1e-3}, [TrainingArguments])
    """
    flags = {field.name for cls in dataclass_types for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in flags:
            raise ValueError(f"{where}: the key {key!r} is not a flag of this recipe. {hint(str(key), flags)}")


def hint(name: str, flags: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, flags, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else "Run the script with --help to see them all."


def as_flags(key: str, value: Any) -> list[str]:
    """The words of a command line that set a flag to a value, as YAML has it; none for `None`."""
    if value is None:  # argparse has no word for None: it is set as a default
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # `--key=value` in one word: a negative number would be taken for a flag.
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def read_mapping(flag: str, text: str | None) -> dict[str, Any]:
    """The value of a flag that is a mapping in YAML, and JSON elsewhere.

    Example:

        >>> read_mapping("config_overrides", '{"depths": [2, 2]}')
        {'depths': [2, 2]}
    """
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"{flag}: received {text!r}; allowed: a JSON object, as in --{flag} '{{\"name\": [1, 2]}}', or a mapping "
            "in the YAML file."
        )
    return values
