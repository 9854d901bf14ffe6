"""Which layers of a model are binarized, in which role, in which order, with which input levels.

Nothing is read off names: the skeleton of the model is run once, on meta tensors (no memory, no arithmetic), and
watched.
"""

import copy
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from hf_stompp.config import BinarizationConfig
from hf_stompp.layers import BinaryEmbedding, BinaryLinear, PackedEmbedding, PackedLinear

LINEARS = (nn.Linear, BinaryLinear, PackedLinear)
TABLES = (nn.Embedding, BinaryEmbedding, PackedEmbedding)
_ACTIVATION_MODULES = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})
_HALF_RECTIFIED = {
    "ReLU",
    "ReLU6",
    "ReLUSquaredActivation",
    "SiLU",
    "SiLUActivation",
    "Mish",
    "MishActivation",
    "Sigmoid",
}
_HALF_RECTIFIED_MODULES = tuple(
    cls for cls in _ACTIVATION_MODULES if "GELU" in cls.__name__ or cls.__name__ in _HALF_RECTIFIED
)
"""Those with no large negative values; LeakyReLU and ELU have them."""

_aten = torch.ops.aten
_HALF_RECTIFIED_OPS = {_aten.relu, _aten.relu_, _aten.gelu, _aten.silu, _aten._softmax, _aten.sigmoid, _aten.relu6}
_SAME_VALUES_OPS = {
    _aten.view, _aten._unsafe_view, _aten.reshape, _aten.transpose, _aten.permute, _aten.clone, _aten.contiguous,
    _aten.expand, _aten.native_dropout, _aten.dropout, _aten._to_copy, _aten.unsqueeze, _aten.squeeze, _aten.t,
    _aten.slice, _aten.alias, _aten.detach,
}  # fmt: skip


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear layer or embedding table.

    Attributes:
        name (`str`): Name of the module in the model.
        key (`str`): Its name inside the base model, the same with and without a head.
        role (`str`): `encoder`, `embedding`, `head`, `pooler`, `stem`, `tied`, `unused`, or `table`: one that can be
            neither binarized nor rounded.
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


@dataclass
class _Call:
    """One execution of a watched module: the tensors are kept alive so that their ids stay unique."""

    name: str
    input: Tensor
    output: Tensor


class _Trace(TorchDispatchMode):
    """The calls of the linears, activation modules and tables, and which tensors came out of a half-rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[_Call] = []
        self.activations: list[_Call] = []
        self.tables: list[_Call] = []
        self.source: dict[int, Tensor] = {}
        """id of a tensor → the half-rectified tensor whose values it has."""
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 1  # DeBERTa reads a scale off a tensor; the values do not matter here, only who calls whom
        out = func(*args, **(kwargs or {}))
        result = out[0] if isinstance(out, tuple) and out else out
        if isinstance(result, Tensor):
            self._alive.append(result)
            if func.overloadpacket in _HALF_RECTIFIED_OPS:
                self.source[id(result)] = result
            elif func.overloadpacket in _SAME_VALUES_OPS and id(args[0]) in self.source:
                self.source[id(result)] = self.source[id(args[0])]
        return out

    def watch(self, name: str, module: nn.Module) -> Any:
        kinds = ((LINEARS, self.linears), (TABLES, self.tables), (nn.Module, self.activations))
        kind = next(calls for types, calls in kinds if isinstance(module, types))

        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            kind.append(_Call(name, args[0], output))
            if isinstance(module, _HALF_RECTIFIED_MODULES):
                self.source[id(output)] = output

        return module.register_forward_hook(hook)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose tensors are all on the meta device: structure and code, no data."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    return copy.deepcopy(model, memo).eval()


def _example_inputs(base: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest input that runs every layer of a base model once."""
    if base.main_input_name == "input_ids":
        return {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    if base.main_input_name == "pixel_values":
        size = getattr(base.config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, getattr(base.config, "num_channels", 3), height, width, device="meta")}
    raise ValueError(
        f"{type(base).__name__} takes {base.main_input_name!r}; hf_stompp can trace models of 'input_ids' or "
        "'pixel_values'."
    )


def _trace(model: PreTrainedModel, with_head: bool = False) -> _Trace:
    """Runs the base model, or all of it, on meta tensors and returns what was executed, by the names of `model`."""
    skeleton = _skeleton(model)
    with ExitStack() as hooks, torch.no_grad(), _Trace() as trace:
        for name, module in skeleton.named_modules():
            if isinstance(module, LINEARS + TABLES + _ACTIVATION_MODULES):
                hooks.callback(trace.watch(name, module).remove)
        try:
            (skeleton if with_head else skeleton.base_model)(**_example_inputs(skeleton.base_model))
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(model).__name__} could not be run on its meta skeleton, so its layers have no order: {error}"
            ) from error
    return trace


def activations_feeding(model: PreTrainedModel, names: set[str]) -> list[str]:
    """Names of the activation modules whose output is the input of one of the linears `names`."""
    trace = _trace(model)
    fed = {
        id(trace.source[id(call.input)])
        for call in trace.linears
        if call.name in names and id(call.input) in trace.source
    }
    return list(dict.fromkeys(call.name for call in trace.activations if id(call.output) in fed))


def embedding_tables(model: PreTrainedModel) -> dict[str, str]:
    """Every embedding table that the base model looks rows up in, and why it must stay in full precision, if so."""
    return _tables(model, _trace(model))


def _tables(model: PreTrainedModel, trace: _Trace) -> dict[str, str]:
    tied = tied_modules(model)
    # A vision model looks nothing up, and its embeddings are no table.
    width = model.get_input_embeddings().embedding_dim if trace.tables else None
    reasons = {}
    for call in trace.tables:
        table = model.get_submodule(call.name)
        if type(table) not in TABLES or table.max_norm is not None:
            reasons[call.name] = "a table with rules of its own"
        elif table.embedding_dim != width:
            reasons[call.name] = "no embedding: its rows have another width than the tokens'"
        else:
            reasons[call.name] = _SKIPPED["tied"] if call.name in tied else ""
    return reasons


def _units(trace: _Trace) -> dict[str, int]:
    """First-execution order: layers that see the same input tensor are one unit."""
    units: dict[str, int] = {}
    by_input: dict[int, int] = {}
    for call in trace.linears:
        units.setdefault(call.name, by_input.setdefault(id(call.input), len(by_input)))
    return units


def _stem(model: PreTrainedModel, units: dict[str, int]) -> set[str]:
    """The first executed layer, if it stands alone and maps something else than hidden states: an embedding
    projection. Query, key and value share their input, and a fused projection of them takes hidden states."""
    first = [name for name, unit in units.items() if unit == 0]
    hidden = getattr(model.config, "hidden_size", None) or getattr(model.config, "dim", None)
    return set(first) if len(first) == 1 and model.get_submodule(first[0]).in_features != hidden else set()


def tied_modules(model: PreTrainedModel) -> set[str]:
    """Linears and tables whose weight is another's too, by the model's own account or as they share the tensor."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name.removesuffix(".weight") for pair in declared.items() for name in pair}
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in LINEARS + TABLES:
            names[id(module.weight)].append(name)
    return tied.union(*(sharing for sharing in names.values() if len(sharing) > 1))


_SKIPPED = {
    "head": "outside the base model",
    "embedding": "embeddings=False",
    "pooler": "pooler=False",
    "stem": "projects the embeddings",
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
                    f"linear layers and embedding tables: {names}{', …' if len(plans) > 8 else ''}."
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
    """Plans every embedding table and linear layer of the model: tables, then in execution order, then those outside
    of the base model. All tables are one unit, the first: together they make the input of the first layer.

    Raises:
        ValueError: Nothing is selected, a pattern matches nothing, a tied or unused layer is asked for by name, or
            the model cannot be traced.
    """
    trace = _trace(model, with_head=bool(config.include))
    units, tied = _units(trace), tied_modules(model)
    stem = _stem(model, units) if units else set()
    half_rectified = {call.name for call in trace.linears if id(call.input) in trace.source}
    base = "" if model.base_model is model else model.base_model_prefix + "."
    executed = list(units)
    others = [n for n, m in model.named_modules(remove_duplicate=False) if type(m) in LINEARS and n not in units]
    plans = [
        LayerPlan(name, name.removeprefix(base), "table" if reason else "embedding", -1, skipped=reason)
        for name, reason in _tables(model, trace).items()
    ]
    for name in executed + others:
        if type(model.get_submodule(name)) not in LINEARS:
            continue
        key = name.removeprefix(base)
        if name in tied:
            role = "tied"
        elif "pooler" in key.split("."):
            role = "pooler"  # in DeBERTa it stands outside of the base model
        elif not name.startswith(base):
            role = "head"
        elif name not in units:
            role = "unused"
        else:
            role = "stem" if name in stem else "encoder"
        unsigned = {"auto": name in half_rectified, "unsigned": True, "signed": False}[config.activation_levels]
        plans.append(LayerPlan(name, key, role, units.get(name, len(units)), unsigned))
    if not config.modules:  # a selection that was made already may be of a model with another head
        _check_patterns(plans, config)
    plans = [_decide(plan, config) for plan in plans]
    if all(plan.skipped for plan in plans):
        raise ValueError(
            f"BinarizationConfig selects none of the {len(plans)} linear layers and embedding tables of "
            f"{type(model).__name__} (include={config.include}, exclude={config.exclude}). Only nn.Linear layers are "
            "binarized; GPT-2's Conv1D is not."
        )
    return _number_units(plans)


def _number_units(plans: list[LayerPlan]) -> list[LayerPlan]:
    """Numbers the units of the binarized layers from 0 without gaps; skipped layers have none."""
    selected = sorted({plan.unit for plan in plans if plan.unit is not None and not plan.skipped})
    number = {unit: i for i, unit in enumerate(selected)}
    return [
        replace(plan, unit=number[plan.unit] if plan.unit in number and not plan.skipped else None) for plan in plans
    ]
