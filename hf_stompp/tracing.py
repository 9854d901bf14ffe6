"""What a model executes, in which order, on which tensors: its skeleton is run once on meta tensors (no memory, no
arithmetic), and watched."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from hf_stompp.layers import (
    BinaryActivation,
    BinaryConv2d,
    BinaryEmbedding,
    BinaryLinear,
    FloatActivation,
    PackedActivation,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
)

LINEARS = (nn.Linear, BinaryLinear, PackedLinear)
CONVOLUTIONS = (nn.Conv2d, BinaryConv2d, PackedConv2d)
LAYERS = LINEARS + CONVOLUTIONS
TABLES = (nn.Embedding, BinaryEmbedding, PackedEmbedding)
TENSORS = (FloatActivation, BinaryActivation, PackedActivation)
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
HALF_RECTIFIED_MODULES = tuple(
    cls for cls in _ACTIVATION_MODULES if "GELU" in cls.__name__ or cls.__name__ in _HALF_RECTIFIED
)
"""Those with no large negative values; LeakyReLU and ELU have them."""

_aten = torch.ops.aten
_HALF_RECTIFIED_OPS = {
    _aten.relu, _aten.relu_, _aten.gelu, _aten.silu, _aten._softmax, _aten._safe_softmax, _aten.sigmoid, _aten.relu6,
}  # fmt: skip
_SAME_VALUES_OPS = {
    _aten.view, _aten._unsafe_view, _aten.reshape, _aten.transpose, _aten.permute, _aten.clone, _aten.contiguous,
    _aten.expand, _aten.native_dropout, _aten.dropout, _aten._to_copy, _aten.unsqueeze, _aten.squeeze, _aten.t,
    _aten.slice, _aten.alias, _aten.detach, _aten.constant_pad_nd, _aten.max_pool2d_with_indices,
}  # fmt: skip
"""What comes out is as negative as what goes in, or less."""
_NORMS = {_aten.native_batch_norm, _aten._native_batch_norm_legit, _aten._native_batch_norm_legit_no_training,
          _aten.cudnn_batch_norm, _aten.native_layer_norm, _aten.native_group_norm}  # fmt: skip
_POOLS = {_aten.mean, _aten._adaptive_avg_pool2d, _aten.adaptive_avg_pool2d, _aten.avg_pool2d}
_SUMS = {_aten.add, _aten.add_}


@dataclass
class Call:
    """One execution of a watched module: the tensors are kept alive so that their ids stay unique."""

    name: str
    input: Tensor
    output: Tensor
    after: "Call | None" = None
    """The layer that its input comes out of, as in [`Trace`]'s `branch`."""
    constant: bool = False
    """Whether its input does not depend on what the model is given, nor on embeddings of its own."""
    version: int = 0
    """Of its input: how often that had been written to."""


class Trace(TorchDispatchMode):
    """The calls of the layers, activation modules and tables, and where their inputs come from.

    Attributes:
        layers, activations, norms, tables (`list[Call]`): In the order of execution; the norms are batch norms.
        binarizable (`list[Call]`): Of the layers, and of the tensors that attention multiplies.
        source (`dict[int, Tensor]`): id of a tensor → the half-rectified tensor whose values, or averages, it has.
        branch (`dict[int, Call]`): id of a tensor → the layer that it comes out of, by nothing but a norm, an
            activation and a gate.
        sums (`list[tuple[Call, Call]]`): The pairs of such layers whose outputs are added.
        pooled (`set[int]`): ids of images of one pixel, made by averaging, and of what is computed of them alone.
        readers (`Counter[int]`): id of a tensor → how many operations and layers take it.
        unpooled (`dict[int, Tensor]`): id of a tensor → what it was before it was made smaller by pooling.

    Args:
        roots (`Iterable[Tensor]`): What a layer's input must depend on: what the model is given and its parameters,
            but for those of the layers.
    """

    def __init__(self, roots: Iterable[Tensor]) -> None:
        super().__init__()
        self.rooted: set[int] = {id(root) for root in roots}
        self.unpooled: dict[int, Tensor] = {}
        self.layers: list[Call] = []
        self.binarizable: list[Call] = []
        self.activations: list[Call] = []
        self.norms: list[Call] = []
        self.tables: list[Call] = []
        self.source: dict[int, Tensor] = {}
        self.branch: dict[int, Call] = {}
        self.sums: list[tuple[Call, Call]] = []
        self.pooled: set[int] = set()
        self.readers: Counter[int] = Counter()
        self._in_layer = False
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 1  # DeBERTa reads a scale off a tensor; the values do not matter here, only who calls whom
        if not self._in_layer:
            self.readers.update(id(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        out = func(*args, **(kwargs or {}))
        if any(id(leaf) in self.rooted for leaf in tree_leaves((args, kwargs))):
            self.rooted |= {id(leaf) for leaf in tree_leaves(out)}
        result = out[0] if isinstance(out, tuple) and out else out
        if isinstance(result, Tensor):
            self._alive.append(result)
            self._follow(func.overloadpacket, args, result)
        return out

    def _follow(self, op: Any, args: Any, result: Tensor) -> None:
        """Takes note of what a tensor is made of."""
        first = id(args[0]) if args else 0
        source, branch = self.source.get(first), self.branch.get(first)
        if op in _SUMS and branch is not None and id(args[1]) in self.branch:
            self.sums.append((branch, self.branch[id(args[1])]))
        for known in (self.source, self.branch):
            known.pop(id(result), None)  # an operation in place makes other values
        half_rectified = op in _HALF_RECTIFIED_OPS or (op is _aten.hardtanh and len(args) > 1 and args[1] == 0)
        if half_rectified:
            self.source[id(result)] = result
        elif (op in _SAME_VALUES_OPS or op in _POOLS) and source is not None:
            self.source[id(result)] = source
        elif op is _aten.mul and source is not None and id(args[1]) in self.source:  # a gate
            self.source[id(result)] = result
        if branch is not None and (half_rectified or op in _NORMS or op in _SAME_VALUES_OPS or op is _aten.mul):
            self.branch[id(result)] = branch
        if op in _POOLS or op is _aten.max_pool2d_with_indices:
            self.unpooled[id(result)] = self.unpooled.get(first, args[0])
        if result.dim() == 4 and result.shape[2:] == (1, 1) and (op in _POOLS or first in self.pooled):
            self.pooled.add(id(result))

    def watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Takes note of the calls of a module; yields the handles of its hooks."""
        kinds = (
            (LAYERS, self.layers),
            (TENSORS, self.binarizable),
            (TABLES, self.tables),
            (_BatchNorm, self.norms),
            (nn.Module, self.activations),
        )
        calls = next(calls for types, calls in kinds if isinstance(module, types))

        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            x = args[0]
            call = Call(name, x, output, self.branch.get(id(x)), id(x) not in self.rooted, x._version)
            calls.append(call)
            if isinstance(module, HALF_RECTIFIED_MODULES):
                self.source[id(output)] = output
                if id(args[0]) in self.branch:
                    self.branch[id(output)] = self.branch[id(args[0])]
            elif isinstance(module, LAYERS):
                self.binarizable.append(call)
                self.branch[id(output)] = call
                self.readers[id(args[0])] += 1
                self._in_layer = False

        def enter(_: nn.Module, args: tuple) -> None:
            self._in_layer = True

        if isinstance(module, LAYERS):
            yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(hook)


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose tensors are all on the meta device: structure and code, no data."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    return copy.deepcopy(model, memo).eval()


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest input that runs every layer of a model once."""
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    if model.main_input_name == "pixel_values":
        # What timm's models are made for, which their config does not say.
        made_for = getattr(model.base_model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", made_for[1:])
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", made_for[0])
        return {"pixel_values": torch.zeros(1, channels, height, width, dtype=model.dtype, device="meta")}
    raise ValueError(
        f"{type(model).__name__} takes {model.main_input_name!r}; hf_stompp can trace models of 'input_ids' or "
        "'pixel_values'."
    )


@torch.inference_mode(False)  # whose tensors have no versions
def trace(model: PreTrainedModel, with_head: bool = False) -> Trace:
    """Runs the base model, or all of it, on meta tensors and returns what was executed, by the names of `model`.

    Raises:
        ValueError: It cannot be run so.
    """
    copied = skeleton(model)
    inputs = example_inputs(copied)
    owned = {id(p) for module in copied.modules() if isinstance(module, LAYERS) for p in module.parameters(False)}
    roots = [*inputs.values(), *(p for p in copied.parameters() if id(p) not in owned)]
    with ExitStack() as hooks, torch.no_grad(), Trace(roots) as found:
        for name, module in copied.named_modules():
            if isinstance(module, (*LAYERS, *TENSORS, *TABLES, *_ACTIVATION_MODULES, _BatchNorm)):
                for handle in found.watch(name, module):
                    hooks.callback(handle.remove)
        execute(copied, inputs, with_head)
    return found


def execute(copied: PreTrainedModel, inputs: dict[str, Tensor], with_head: bool = False) -> None:
    """Runs a skeleton's base model, or all of it.

    Raises:
        ValueError: It cannot be run.
    """
    try:
        if with_head:
            copied(**inputs)
        elif isinstance(copied.base_model, PreTrainedModel):
            copied.base_model(**inputs)
        else:  # one of timm, head and all, in a wrapper
            copied.base_model(*inputs.values())
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise ValueError(
            f"{type(copied).__name__} could not be run on its meta skeleton, with {given}, so its layers have no "
            f"order: {error}"
        ) from error


def activations_feeding(model: PreTrainedModel, names: set[str]) -> list[str]:
    """Names of the activation modules whose output is the input of one of the layers `names`."""
    found = trace(model)
    fed = {
        id(found.source[id(call.input)])
        for call in found.layers
        if call.name in names and id(call.input) in found.source
    }
    return list(dict.fromkeys(call.name for call in found.activations if id(call.output) in fed))


def norms_after(model: PreTrainedModel) -> dict[str, str]:
    """Layer → the batch norm that its output goes into, and nowhere else."""
    found = trace(model)
    calls = Counter(call.name for call in found.layers + found.norms)
    layers = {id(call.output): call.name for call in found.layers if calls[call.name] == 1}
    return {
        layers[id(call.input)]: call.name
        for call in found.norms
        if id(call.input) in layers and found.readers[id(call.input)] == 1 and calls[call.name] == 1
    }
