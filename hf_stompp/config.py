"""`BinarizationConfig`: at once the quantization config in `config.json`, the recipes' flags and their YAML keys."""

import dataclasses
import math
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import Self

from hf_stompp import schedule

QUANT_METHOD = "stompp"
FORMAT_VERSION = 1
RESOLVED = ("modules", "folded")
"""Fields that are written by `binarize` and `pack`, for whoever loads the model."""


PRESETS: dict[str, dict[str, Any]] = {
    "bert-w1a1": {"replace_gelu": True, "refresh": 0.1},
    "resnet-w1a1": {},
    "weights-only": {"activations": False},
    "ste-baseline": {"progression": "none"},
    "bit-like": {"progression": "none", "scale": "tensor", "clip": 1.0, "clip_weights": False, "replace_gelu": True},
    "bibert-like": {
        "progression": "none",
        "clip": 1.0,
        "activation_levels": "signed",
        "learn_activation_scale": False,
        "learn_activation_shift": False,
    },
}
"""What users do → the fields that are not the defaults; see [`BinarizationConfig.preset`]."""


def _flag(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(repr=False)
class BinarizationConfig(QuantizationConfigMixin):
    r"""How a model is binarized: what, by which rule, and when.

    $$\hat w = \begin{cases} α \operatorname{sign}(w) & \text{frozen}\\ \operatorname{clip}(w, -κα, κα) & \text{soft}
    \end{cases} \qquad \hat x = \begin{cases} γ \operatorname{sign}(x - β) \text{ or } γ\,1[x \ge γ/2] & \text{frozen}
    \\ \operatorname{clip}(x - β, -κγ, κγ) \text{ or } \operatorname{clip}(x, 0, κγ) & \text{soft}\end{cases}$$

    Every field but `modules` is a flag of the recipes and a key of their YAML files, with the help text below.

    Raises:
        TypeError: A field has the wrong type, or its name is unknown.
        ValueError: A field is out of range, or two fields contradict each other.

    Example:

        >>> stompp = BinarizationConfig()                                        # StoMPP, W1A1
        >>> ste_baseline = BinarizationConfig(surrogate="ste", progression="none")
        >>> weights_only = BinarizationConfig(activations=False)
        >>> clipped_network = BinarizationConfig(progression="none", progression_start=1.0)

    Defaults, by the studies of docs/reproduction.md (chains of 4 to 32 layers, ResNets of 4 to 16, three seeds, equal
    steps): STE on frozen entries is above none at each depth; without a weight scale StoMPP does not learn; a clip at
    2 is within 4 points of the best for all methods; how much of a mask is drawn anew hardly matters layer by layer.
    Windows of one unit are as good as wide ones in ResNets. In deep networks without shortcuts wide ones are better:
    `overlap` of half the number of units, and `progression_end=0.75`, or 0.9 with `surrogate="none"`.

    Source: arXiv 2601.22660, arXiv 2606.27759.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)
    mode: Literal["train", "packed"] = _flag(
        "train", "train: latent full-precision weights under masks; packed: 1-bit weights (what pack() makes)."
    )
    weights: bool = _flag(True, "Binarize the weights.")
    activations: bool = _flag(True, "Binarize the inputs of the selected layers; without it the model is W1A32.")
    surrogate: Literal["none", "ste"] = _flag(
        "ste", "Gradient of frozen entries. none: none (STE-free); ste: straight-through, the same as soft entries."
    )
    progression: Literal["layerwise", "global", "none"] = _flag(
        "layerwise",
        "layerwise: unit by unit; global: all units together; none: all at once at progression_start (0 with "
        "surrogate ste is the STE baseline, 1 never freezes: the clipped network).",
    )
    order: Literal["forward", "reverse", "random"] = _flag(
        "forward", "Order of the units in a layerwise progression: forward is from the input to the output."
    )
    curve: Literal["linear", "cosine", "cubic"] = _flag(
        "linear", "Rise of the frozen fraction inside a window; cubic is 1 - (1 - s)^3."
    )
    overlap: float = _flag(1.0, "Width of a unit's window, in units of progress/number of units; at least 1.")
    progression_start: float = _flag(0.0, "Start of the progression, as a fraction of all training steps.")
    progression_end: float = _flag(0.5, "End of the progression, as a fraction of all training steps.")
    refresh: float = _flag(1.0, "Share of mask entries drawn anew at each refresh; 0 only ever grows the frozen set.")
    refresh_interval: int = _flag(1, "Optimizer steps between two refreshes.")
    scale: Literal["channel", "tensor", "none"] = _flag(
        "channel", "Weight scale: mean |w| per output channel, one per tensor, or 1."
    )
    clip: float | None = _flag(
        2.0, "Clip range in units of the scale; inf (null in YAML) does not clip. Also the range of the STE."
    )
    clip_weights: bool = _flag(
        True, "Clip soft weights too; without it all weights pass all gradients (the identity as their STE)."
    )
    activation_levels: Literal["auto", "signed", "unsigned"] = _flag(
        "auto",
        "auto: {0, +s} for inputs that come out of ReLU, GELU or softmax, {-s, +s} for all others. What attention "
        "multiplies always is auto.",
    )
    learn_activation_scale: bool = _flag(True, "Train the activation scale of each layer (it starts calibrated).")
    learn_activation_shift: bool = _flag(True, "Train a shift for each input feature of layers with signed levels.")
    replace_gelu: bool = _flag(False, "Replace the GELU that feeds a binarized layer by ReLU.")
    replace_relu: bool = _flag(
        False,
        "Drop the ReLU that feeds a binarized layer: its inputs get the levels {-s, +s}, and its clip is the "
        "non-linearity. For convolution networks trained from scratch.",
    )
    bireal_shortcuts: bool = _flag(
        False, "A full-precision shortcut around each convolution of the blocks of a ResNet, as in Bi-Real Net."
    )
    attention: bool = _flag(
        False,
        "Binarize what attention multiplies too: queries, keys and values, and, with the levels {0, +s}, the "
        "probabilities after the softmax. Those of one attention are a unit.",
    )
    pooler: bool = _flag(False, "Binarize the pooler too.")
    embeddings: bool = _flag(
        False, "Binarize the embedding tables too, as the first unit: 1 bit an entry and a scale for each row."
    )
    embedding_bits: Literal[32, 16, 8, 4, 1] = _flag(
        32, "Bits, in the packed model, of embedding tables that are not binarized in training: rounded when packed."
    )
    include: list[str] = _flag(
        [],
        "fnmatch patterns of layers and tables to binarize as well, whatever their role. Wins over exclude.",
    )
    exclude: list[str] = _flag([], "fnmatch patterns of module names that stay in full precision.")
    mask_seed: int = _flag(0, "Seed of the masks and of a random order; independent of the training seed.")
    format_version: int = _flag(FORMAT_VERSION, "Version of this schema and of the packed format.")
    modules: dict[str, Any] = field(default_factory=dict, init=False)
    """The resolved selection, written by `binarize`: layer → {"unit", "levels"} or table → {"unit", "bits"}; and by
    `pack`, rounded table → {"bits"}."""
    folded: list[str] = field(default_factory=list, init=False)
    """Names, in the base model, of the batch norms and activations that `pack` has folded into thresholds."""
    unknown: dict[str, Any] = field(default_factory=dict, init=False)
    """Keys of a newer version that this one does not know: kept, and saved again."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.clip is not None and math.isinf(self.clip) and self.clip > 0:
            self.clip = None  # JSON has no infinity
        self._check_ranges()
        self._check_combinations()

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, hint = getattr(self, item.name), hints[item.name]
            if not _matches(value, hint):
                allowed = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                is_choice = type(value) in {type(choice) for choice in typing.get_args(hint)}
                error = ValueError if typing.get_origin(hint) is Literal and is_choice else TypeError
                raise error(f"BinarizationConfig.{item.name} is {value!r}; allowed: {allowed}.")
            if isinstance(value, int) and hint in (float, float | None):
                setattr(self, item.name, float(value))

    def _check_ranges(self) -> None:
        ranges = {
            "overlap": (1.0, math.inf),
            "progression_start": (0.0, 1.0),
            "progression_end": (0.0, 1.0),
            "refresh": (0.0, 1.0),
            "refresh_interval": (1, math.inf),
            "mask_seed": (0, math.inf),
            "format_version": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"BinarizationConfig.{name} is {value}; allowed: a finite number in [{low}, {high}].")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"BinarizationConfig.clip is {self.clip}; allowed: a number above 0, or inf (None).")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"BinarizationConfig.format_version is {self.format_version}, but this hf_stompp reads up to "
                f"{FORMAT_VERSION}; upgrade it with `pip install --upgrade hf_stompp`."
            )

    def _check_combinations(self) -> None:
        if not (self.weights or self.activations):
            raise ValueError(
                "BinarizationConfig has weights=False and activations=False: nothing to binarize. Set one of them, or "
                "load the model without a quantization_config for full precision."
            )
        if self.progression != "none" and self.progression_start >= self.progression_end:
            raise ValueError(
                f"BinarizationConfig.progression_start ({self.progression_start}) must be below progression_end "
                f"({self.progression_end}); both are fractions of training."
            )
        if self.progression == "none" and self.surrogate == "none" and self.progression_start == 0:
            raise ValueError(
                'BinarizationConfig has progression="none" and surrogate="none": everything would be frozen from '
                'step 0 and never trained. Use surrogate="ste" (the STE baseline) or progression="layerwise" (StoMPP).'
            )
        layerwise = {"order": "forward", "overlap": 1.0}
        for name, default in layerwise.items():
            if self.progression != "layerwise" and getattr(self, name) != default:
                raise ValueError(
                    f"BinarizationConfig.{name} is {getattr(self, name)!r} with progression={self.progression!r}, "
                    f'which has no order of units: leave it at {default!r}, or set progression="layerwise".'
                )
        if self.embeddings and not self.weights:
            raise ValueError(
                "BinarizationConfig has embeddings=True and weights=False: tables are weights. Set weights=True, or "
                "embeddings=False."
            )
        if self.attention and not self.activations:
            raise ValueError(
                "BinarizationConfig has attention=True and activations=False: what attention multiplies are "
                "activations. Set activations=True, or attention=False."
            )
        if self.mode == "packed" and not self.weights:
            raise ValueError('BinarizationConfig has mode="packed" and weights=False: only 1-bit weights are packed.')
        if not self.activations and self.activation_levels != "auto":
            raise ValueError(
                f"BinarizationConfig.activation_levels is {self.activation_levels!r} with activations=False: there "
                'are no binary inputs. Leave it at "auto" or set activations=True.'
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The settings for a thing that users do.

        Args:
            name (`str`): `bert-w1a1`: 1-bit weights and activations of a BERT, GELU replaced by ReLU; `resnet-w1a1`:
                those of a ResNet; `weights-only`: 1-bit weights under full-precision activations; `ste-baseline`:
                everything binary from the first step, with the straight-through estimator. These two leave the GELU of
                a BERT: to compare like with like, give them `replace_gelu=True` as `bert-w1a1` has. `bit-like` and
                `bibert-like`: the rules of BiT (Liu et al., 2022; one scale a matrix, weights without a clip, learned
                scales and shifts of inputs that pass gradients up to the scale) and of BiBERT (Qin et al., 2022; a
                scale a row, inputs of two signs, nothing learned about them), in one step. They are to be compared
                with, and are not those: means of weights are not taken off first, scales begin calibrated, and the
                probabilities of attention, if binary, come out of a softmax.
            changes: Fields that are otherwise, as `exclude=["*.query"]`.

        Raises:
            TypeError: There is no such field.
            ValueError: There is no such preset, or a field is out of range.

        Example:

            >>> BinarizationConfig.preset("weights-only", progression_end=0.8).activations
            False
        """
        if name not in PRESETS:
            raise ValueError(f"BinarizationConfig.preset: received {name!r}; allowed: {', '.join(PRESETS)}.")
        allowed = [field.name for field in dataclasses.fields(cls) if field.init]
        if unknown := sorted(set(changes) - set(allowed)):
            raise TypeError(f"BinarizationConfig.preset: received {unknown[0]!r}; allowed: {', '.join(allowed)}.")
        return cls(**{**PRESETS[name], **changes})

    @property
    def weight_clip(self) -> float | None:
        """κ of the weights; `None` does not clip them."""
        return self.clip if self.clip_weights else None

    def unit_fractions(self, step: int, max_steps: int, units: int) -> Sequence[float]:
        """The frozen fraction of each of `units` units in optimizer step `step` (counted from 1) of `max_steps`."""
        if self.progression == "none":
            # "From step 0" is the first step, hence the steps *before* this one; a start of 1 is never reached.
            s = schedule.progress(step - 1, max_steps, self.progression_start, self.progression_start)
        else:
            s = schedule.progress(step, max_steps, self.progression_start, self.progression_end)
        return schedule.unit_fractions(
            s,
            units,
            progression=self.progression,
            order=self.order,
            curve=self.curve,
            overlap=self.overlap,
            seed=self.mask_seed,
        )

    @property
    def straight_through(self) -> float:
        """κ of the straight-through gradient of binary inputs; 0 without one, as where thresholds have taken batch
        norms in, whose slopes are gone."""
        clip = math.inf if self.clip is None else self.clip
        return clip if self.surrogate == "ste" and not self.folded else 0.0

    @property
    def never_freezes(self) -> bool:
        """Whether this is the clipped network: `progression="none"` with a start that no step reaches."""
        return self.progression == "none" and self.progression_start == 1.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads `quantization_config` of a `config.json`; keys of a newer version are kept, with a warning."""
        fields = {item.name: item for item in dataclasses.fields(cls)}
        known = {key: value for key, value in config_dict.items() if key in fields and fields[key].init}
        config = cls(**known)
        config.modules = dict(_of_kind(config_dict, "modules", dict, "a mapping from names"))
        config.folded = list(_of_kind(config_dict, "folded", list, "a list of names"))
        if not all(isinstance(name, str) for name in config.folded):
            raise ValueError(f"quantization_config.folded is {config.folded}; allowed: a list of names.")
        config.unknown = {key: value for key, value in config_dict.items() if key not in fields}
        if config.unknown:
            warnings.warn(
                f"quantization_config has keys that this version of hf_stompp does not know: "
                f"{sorted(config.unknown)}. They are kept but have no effect; a newer version may need them: "
                "`pip install --upgrade hf_stompp`.",
                stacklevel=2,
            )
        unused = config.update(**kwargs)
        config.__post_init__()
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the kept unknown keys, as JSON knows them."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("unknown"), **fields}

    def settings(self) -> dict[str, Any]:
        """What was chosen, without what `binarize` and `pack` wrote beside it."""
        return {key: value for key, value in self.to_dict().items() if key not in RESOLVED}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def _matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` (a bool is not a number here; an int is a float)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _of_kind(config_dict: dict[str, Any], field: str, kind: type, allowed: str) -> Any:
    """What a file has in a field, or nothing of that kind."""
    value = config_dict.get(field)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"quantization_config.{field} is {value!r}; allowed: {allowed}.")
    return value or kind()
