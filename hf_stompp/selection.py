"""Which layers of a model are binarized, in which role, in which order, with which input levels.

Nothing is read off names: what the model executes on meta tensors says it (see `tracing`).
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor
from transformers import PreTrainedModel

from hf_stompp.attention import with_places
from hf_stompp.config import BinarizationConfig
from hf_stompp.tracing import CONVOLUTIONS, LAYERS, TABLES, TENSORS, Call, Trace, trace


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear layer, convolution or embedding table.

    Attributes:
        name (`str`): Name of the module in the model.
        key (`str`): Its name inside the base model, the same with and without a head.
        role (`str`): `encoder`, `attention`, `embedding`, `head`, `pooler`, `stem`, `shortcut`, `depthwise`, `gate`,
            `tied`, `unused`, or `table`: one that can be neither binarized nor rounded.
        unit (`int`, *optional*): Place of its unit in execution order, from 0; `None` if it stays in full precision.
        unsigned (`bool`): Whether its input is the output of a ReLU, GELU, softmax or the like.
        skipped (`str`): Why it stays in full precision; empty if it is binarized.
    """

    name: str
    key: str
    role: str
    unit: int | None = None
    unsigned: bool = False
    skipped: str = ""


def embedding_tables(model: PreTrainedModel) -> dict[str, str]:
    """Every embedding table that the base model looks rows up in, and why it must stay in full precision, if so."""
    return _tables(model, trace(model))


def _tables(model: PreTrainedModel, found: Trace) -> dict[str, str]:
    tied = tied_modules(model)
    # What a vision model looks up, as positions, is no input of it.
    of_tokens = found.tables and model.main_input_name == "input_ids"
    width = model.get_input_embeddings().embedding_dim if of_tokens else None
    reasons = {}
    for call in found.tables:
        table = model.get_submodule(call.name)
        if type(table) not in TABLES or table.max_norm is not None:
            reasons[call.name] = "a table with rules of its own"
        elif table.embedding_dim != width:
            reasons[call.name] = "no embedding: its rows have another width than the tokens'"
        else:
            reasons[call.name] = _SKIPPED["tied"] if call.name in tied else ""
    return reasons


def _units(found: Trace) -> dict[str, int]:
    """First-execution order: layers that see the same input tensor are one unit, and so are the tensors of one
    attention."""
    units: dict[str, int] = {}
    known: dict[int | str, int] = {}
    layers = {call.name for call in found.layers}
    for call in found.binarizable:
        shared = id(call.input) if call.name in layers else call.name.rpartition(".")[0]
        units.setdefault(call.name, known.setdefault(shared, len(known)))
    return units


def _stem(model: PreTrainedModel, units: dict[str, int]) -> set[str]:
    """The first executed layer: a convolution, which takes pixels; or a linear one, if it stands alone and maps
    something else than hidden states, an embedding projection. Query, key and value share their input, and a fused
    projection of them takes hidden states."""
    first = [name for name, unit in units.items() if unit == 0]
    layer = model.get_submodule(first[0])
    if isinstance(layer, CONVOLUTIONS):
        return set(first)
    hidden = getattr(model.config, "hidden_size", None) or getattr(model.config, "dim", None)
    return set(first) if len(first) == 1 and layer.in_features != hidden else set()


def _heads(model: PreTrainedModel) -> set[str]:
    """What is outside of the base model; of timm's models, which are base and head in one, their classifier."""
    base = "" if model.base_model is model else model.base_model_prefix + "."
    names = {name for name, module in model.named_modules() if type(module) in LAYERS}
    classifier = getattr(model.base_model, "get_classifier", None)
    inside = set(classifier().modules()) if classifier else set()
    return {name for name in names if not name.startswith(base) or model.get_submodule(name) in inside}


def _shortcuts(model: PreTrainedModel, found: Trace) -> set[str]:
    """The convolutions that stand beside others: of two branches that are added, and neither of which comes out of the
    other, the one that takes what other layers take too; if both take the same, the one with the smaller kernel."""

    def source(call: Call) -> Tensor:  # also where one of them takes it pooled, as in a ResNet-D
        return found.unpooled.get(id(call.input), call.input)

    users: dict[int, set[str]] = defaultdict(set)
    for call in found.layers:
        users[id(source(call))].add(call.name)

    def area(call: Call) -> int:
        height, width = model.get_submodule(call.name).kernel_size
        return height * width

    def comes_out_of(call: Call | None, other: Call) -> bool:
        return call is not None and (call is other or comes_out_of(call.after, other))

    shortcuts = set()
    for one, other in found.sums:
        if not all(isinstance(model.get_submodule(call.name), CONVOLUTIONS) for call in (one, other)):
            continue
        if comes_out_of(one, other) or comes_out_of(other, one):
            continue
        small, large = sorted((one, other), key=area)
        beside = [call for call in (one, other) if len(users[id(source(call))]) > 1]
        if source(one) is source(other):
            beside = [small] if area(small) < area(large) else []
        shortcuts |= {call.name for call in beside if len(beside) == 1}
    return shortcuts


def _roles(model: PreTrainedModel, found: Trace, units: dict[str, int]) -> dict[str, str]:
    """Layer → role, of those that the base model executes and that have a special place there."""
    roles = {}
    for call in found.layers:
        layer = model.get_submodule(call.name)
        if isinstance(layer, CONVOLUTIONS) and id(call.input) in found.pooled:
            roles[call.name] = "gate"
        elif isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels > 1:
            roles[call.name] = "depthwise"
    roles |= dict.fromkeys(_shortcuts(model, found), "shortcut")
    roles |= dict.fromkeys((call.name for call in found.layers if call.constant), "constant")
    return roles | dict.fromkeys(_stem(model, units) if units else (), "stem")


def tied_modules(model: PreTrainedModel) -> set[str]:
    """Layers and tables whose weight is another's too, by the model's own account or as they share the tensor."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name.removesuffix(".weight") for pair in declared.items() for name in pair}
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in LAYERS + TABLES:
            names[id(module.weight)].append(name)
    return tied.union(*(sharing for sharing in names.values() if len(sharing) > 1))


_SKIPPED = {
    "head": "outside the base model",
    "embedding": "embeddings=False",
    "pooler": "pooler=False",
    "stem": "the first layer: takes pixels, or projects the embeddings",
    "shortcut": "a shortcut around other layers",
    "depthwise": "depthwise: few weights, all of a channel",
    "gate": "a gate: takes averages of whole images",
    "constant": "takes no input of the model, but constants, as coordinates",
    "tied": "its weight is tied to another tensor",
    "unused": "not executed by the base model",
}


def _matches_any(plan: LayerPlan, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (plan.name, plan.key))


def _check_patterns(plans: list[LayerPlan], config: BinarizationConfig) -> None:
    for field in ("include", "exclude"):
        for pattern in getattr(config, field):
            if not any(_matches_any(plan, [pattern]) for plan in plans):
                names = ", ".join(plan.name for plan in plans[:8])
                raise ValueError(
                    f"BinarizationConfig.{field} has the pattern {pattern!r}, which matches none of the {len(plans)} "
                    f"layers and embedding tables: {names}{', …' if len(plans) > 8 else ''}."
                )


def _decide(plan: LayerPlan, config: BinarizationConfig) -> LayerPlan:
    """Fills in why a layer is skipped, if it is and it is not known yet."""
    if _matches_any(plan, config.include):
        reason = plan.skipped or (_SKIPPED[plan.role] if plan.role in ("tied", "unused") else "")
        if plan.role == "embedding" and not config.weights:
            reason = "weights=False"
        if reason:
            raise ValueError(f"BinarizationConfig.include selects {plan.name!r}, which cannot be binarized: {reason}.")
        return plan
    if plan.skipped:
        return plan
    if _matches_any(plan, config.exclude):
        return replace(plan, skipped="exclude")
    if (plan.role == "pooler" and config.pooler) or (plan.role == "embedding" and config.embeddings):
        return plan
    return replace(plan, skipped=_SKIPPED.get(plan.role, ""))


def select(model: PreTrainedModel, config: BinarizationConfig) -> list[LayerPlan]:
    """Plans every embedding table, linear layer and convolution of the model, and, with `attention`, the tensors that
    attention multiplies: tables, then in execution order, then those outside of the base model. All tables are one
    unit, the first: together they make the input of the first layer.

    Raises:
        ValueError: Nothing is selected, a pattern matches nothing, a tied or unused layer is asked for by name, or
            the model cannot be traced.
    """
    if config.attention:
        model = with_places(model)
    found = trace(model, with_head=bool(config.include))
    units, tied = _units(found), tied_modules(model)
    roles, heads = _roles(model, found, units), _heads(model)
    half_rectified = {call.name for call in found.binarizable if id(call.input) in found.source}
    base = "" if model.base_model is model else model.base_model_prefix + "."
    executed = list(units)
    others = [n for n, m in model.named_modules(remove_duplicate=False) if type(m) in LAYERS and n not in units]
    plans = [
        LayerPlan(name, name.removeprefix(base), "table" if reason else "embedding", -1, skipped=reason)
        for name, reason in _tables(model, found).items()
    ]
    for name in executed + others:
        if type(model.get_submodule(name)) not in LAYERS + TENSORS:
            continue
        key = name.removeprefix(base)
        if name in tied:
            role = "tied"
        elif type(model.get_submodule(name)) in TENSORS:
            role = "attention"
        elif "pooler" in key.split("."):
            role = "pooler"  # in DeBERTa it stands outside of the base model
        elif name in heads:
            role = "head"
        elif name not in units:
            role = "unused"
        else:
            role = roles.get(name, "encoder")
        levels = "auto" if role == "attention" else config.activation_levels  # all probabilities have one sign
        unsigned = {"auto": name in half_rectified, "unsigned": True, "signed": False}[levels]
        plans.append(LayerPlan(name, key, role, units.get(name, len(units)), unsigned))
    if not config.modules:  # a selection that was made already may be of a model with another head
        _check_patterns(plans, config)
    plans = [_decide(plan, config) for plan in plans]
    if all(plan.skipped or plan.role == "attention" for plan in plans):
        raise ValueError(
            f"BinarizationConfig selects none of the {len(plans)} layers and embedding tables of "
            f"{type(model).__name__} (include={config.include}, exclude={config.exclude}). Only nn.Linear, nn.Conv2d "
            f"and nn.Embedding themselves are binarized, not what is made after them{_left_alone(model)}."
        )
    return _number_units(plans)


def _left_alone(model: PreTrainedModel) -> str:
    """The classes of other modules that have a matrix of weights, or one of more dimensions, in brackets."""
    names = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) not in LAYERS + TABLES and isinstance(weight, Tensor) and weight.dim() > 1:
            names.add(type(module).__name__)
    return f" ({', '.join(sorted(names)[:5])})" if names else ""


def _number_units(plans: list[LayerPlan]) -> list[LayerPlan]:
    """Numbers the units of the binarized layers from 0 without gaps; skipped layers have none."""
    selected = sorted({plan.unit for plan in plans if plan.unit is not None and not plan.skipped})
    number = {unit: i for i, unit in enumerate(selected)}
    return [
        replace(plan, unit=number[plan.unit] if plan.unit in number and not plan.skipped else None) for plan in plans
    ]
