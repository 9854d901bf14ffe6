"""`summary`: what is binarized in a model, what is not and why, and where its bytes are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_stompp.attention import with_places
from hf_stompp.config import BinarizationConfig
from hf_stompp.layers import PACKED, BinaryEmbedding, BinaryLayer, PackedEmbedding, PackedLayer
from hf_stompp.packing import packed_length
from hf_stompp.patching import frozen_fraction, is_packed
from hf_stompp.selection import LayerPlan, select
from hf_stompp.tracing import CONVOLUTIONS, LAYERS, TENSORS

_LEVELS = {True: "{0,+s}", False: "{-s,+s}"}
"""Unsigned or not → as it is shown."""


@dataclass(frozen=True)
class LayerSummary:
    """One row of [`Summary`]: a layer, an embedding table, everything else, or an adapter.

    Attributes:
        name (`str`): Module name, or `norms and others`.
        role (`str`): Role of the layer (see [`~selection.LayerPlan`]), or `embedding`.
        unit (`int`, *optional*): Place in the order of the progression.
        weight_bits, input_bits (`int`): Bits of weights and inputs when fully frozen and packed; 0 for the weights of
            what has none, as the tensors that attention multiplies.
        levels (`str`): `{-s,+s}` or `{0,+s}` for 1-bit inputs, else empty.
        frozen (`float`, *optional*): Frozen fraction now.
        parameters (`int`): Parameters of the full-precision layer.
        float_bytes, packed_bytes (`int`): Size in float32, and in the packed checkpoint with all that is not packed in
            the dtype of the model.
        skipped (`str`): Why it stays in full precision.
    """

    name: str
    role: str
    unit: int | None
    weight_bits: int
    input_bits: int
    levels: str
    frozen: float | None
    parameters: int
    float_bytes: int
    packed_bytes: int
    skipped: str


@dataclass(frozen=True)
class Summary:
    """The table that [`summary`] returns; `print` it, or read its `rows`.

    Attributes:
        model (`str`): Its class.
        rows (`tuple[LayerSummary, ...]`): A row for each layer, table and tensor.
        frozen_fraction (`float`): Of all weights, now.
        contract (`str`): What is 1-bit once all is frozen, by which accuracies are compared. `fully binary`: all
            layers of the encoder with their inputs, what attention multiplies, the pooler if there is one, and the
            word embeddings, which is what the public binary BERTs mean by W1A1. `linears only` (or `convolutions
            only`, or `layers only` where there are both): the layers with their inputs, but not all of the rest.
            `weights only`, `inputs only`: one of the two. `in part`: some of the layers. `full precision`: none.
            Stems, shortcuts, depthwise convolutions, gates and heads do not count.
    """

    model: str
    rows: tuple[LayerSummary, ...]
    frozen_fraction: float
    contract: str

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def float_bytes(self) -> int:
        return sum(row.float_bytes for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        return sum(row.packed_bytes for row in self.rows)

    def __str__(self) -> str:
        header = (
            "layer",
            "role",
            "unit",
            "W",
            "A",
            "levels",
            "frozen",
            "params",
            "fp32 bytes",
            "packed",
            "kept because",
        )
        lines = [header] + [_cells(row) for row in self.rows]
        total = ("total", "", "", "", "", "", f"{self.frozen_fraction:.0%}", f"{self.parameters:,}")
        lines.append((*total, f"{self.float_bytes:,}", f"{self.packed_bytes:,}", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        left = {0, 1, 5, 10}
        text = [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        one_bit = sum(row.parameters for row in self.rows if row.weight_bits == 1)
        end = (
            f"{self.model}: {self.contract}; {one_bit:,} of {self.parameters:,} parameters are 1-bit when frozen; "
            f"{self.float_bytes / self.packed_bytes:.1f}x smaller when packed."
        )
        return "\n".join(line.rstrip() for line in (text[0], rule, *text[1:-1], rule, text[-1], end))


def _cells(row: LayerSummary) -> tuple[str, ...]:
    return (
        row.name,
        row.role,
        "" if row.unit is None else str(row.unit),
        str(row.weight_bits or ""),
        str(row.input_bits),
        row.levels,
        "" if row.frozen is None else f"{row.frozen:.0%}",
        f"{row.parameters:,}",
        f"{row.float_bytes:,}",
        f"{row.packed_bytes:,}",
        row.skipped,
    )


def summary(model: Any, config: BinarizationConfig | None = None) -> Summary:
    """Describes every layer of a full-precision, latent or packed model, and the adapters on it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        config (`BinarizationConfig`, *optional*): For a full-precision model, the config it would be binarized with;
            a latent or packed model has its own.

    Example:

        >>> print(summary(model))  # doctest: +SKIP
    """
    if hasattr(model, "peft_config"):
        return _with_adapters(model, config)
    recorded = getattr(model.config, "quantization_config", None)
    config = recorded if isinstance(recorded, BinarizationConfig) else config or BinarizationConfig()
    if config.attention:
        model = with_places(model)
    rows, counted = [], set()
    plans = {plan.name: plan for plan in select(model, config)}
    for plan in plans.values():
        layer = model.get_submodule(plan.name)
        if isinstance(layer, LAYERS):
            counted |= {id(tensor) for tensor in layer.state_dict(keep_vars=True).values()}
            rows.append(_layer_row(plan, layer, config))
        elif isinstance(layer, TENSORS):
            counted |= {id(tensor) for tensor in layer.parameters()}
            rows.append(_tensor_row(plan, layer))
    rest = {id(p): (name, p) for name, p in model.named_parameters() if id(p) not in counted}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and rest.pop(id(module.weight), False):
            plan = plans.get(name, LayerPlan(name, name, "table", skipped="not executed"))
            rows.append(_table_row(plan, module, config.embedding_bits if plan.role == "embedding" else 32))
    # Of all buffers, those of batch norms are the ones that are in a file without being a layer's.
    statistics = [b for norm in model.modules() if isinstance(norm, _BatchNorm) for b in norm.buffers()]
    rows.append(_rest_row("norms and others", [p for _, p in rest.values()], statistics))
    frozen = 1.0 if is_packed(model) else frozen_fraction(model)
    return Summary(type(model).__name__, tuple(rows), frozen, _contract(model, rows))


def _contract(model: Any, rows: Sequence[LayerSummary]) -> str:
    """See [`Summary`]."""
    layers = [row for row in rows if row.role in ("encoder", "unused")]
    weights, inputs = {row.weight_bits == 1 for row in layers}, {row.input_bits == 1 for row in layers}
    if weights == inputs == {False}:
        return "full precision"
    if len(weights) > 1 or len(inputs) > 1:
        return "in part"
    if weights != inputs:
        return "weights only" if weights == {True} else "inputs only"
    attention = {row.input_bits for row in rows if row.role == "attention"}
    others = [row.weight_bits for row in rows if row.role == "pooler"]
    if model.main_input_name == "input_ids":
        table = model.get_input_embeddings()
        named = {module: name for name, module in model.named_modules()}
        # One that is tied to the output layer has no row of its own: it stays in full precision.
        others.append(next((row.weight_bits for row in rows if row.name == named[table]), 32))
    if attention == {1} and set(others) <= {1}:
        return "fully binary"
    kinds = {isinstance(model.get_submodule(row.name), CONVOLUTIONS) for row in layers}
    return "layers only" if len(kinds) > 1 else "convolutions only" if kinds == {True} else "linears only"


def _with_adapters(model: Any, config: BinarizationConfig | None) -> Summary:
    from hf_stompp.peft.base import adapter_weights, kind_of, without_adapters  # who has adapters has PEFT

    base = summary(without_adapters(model), config)
    rows = list(base.rows)
    for name, adapter in model.peft_config.items():
        weights = adapter_weights(model, name).values()
        count, size = sum(tensor.numel() for tensor in weights), sum(tensor.nbytes for tensor in weights)
        bits = 8 * max((tensor.element_size() for tensor in weights), default=4)
        role = f"adapter ({kind_of(adapter)})"
        rows.append(LayerSummary(name, role, None, bits, 32, "", None, count, 4 * count, size, "beside the bits"))
    return Summary(base.model, tuple(rows), base.frozen_fraction, base.contract)


def _layer_row(plan: LayerPlan, layer: Any, config: BinarizationConfig) -> LayerSummary:
    # Its shape, which a packed layer's weight does not have.
    shape = layer if isinstance(layer, PackedLayer) else PACKED[type(layer)].empty(layer, binary_input=False)
    weights, biases = shape.outputs * shape.row_length, 0 if layer.bias is None else shape.outputs
    float_bytes = 4 * (weights + biases)
    binary = not plan.skipped
    unsigned = layer.unsigned if isinstance(layer, BinaryLayer) else plan.unsigned
    if isinstance(layer, PackedLayer) and layer.activation_levels is not None:
        unsigned = layer.activation_levels[0].item() == 0
    binary_input = binary and config.activations
    packed_bytes = sum(tensor.nbytes for tensor in layer.parameters())
    if binary and config.weights:
        # Bits, scales and bias; thresholds and two levels for binary inputs.
        bits = shape.outputs * packed_length(shape.row_length)
        bias_bytes = 0 if layer.bias is None else layer.bias.nbytes
        packed_bytes = bits + bias_bytes + 4 * shape.outputs
        packed_bytes += 4 * (shape.input_features + 2) if binary_input else 0
    frozen = layer.fraction if isinstance(layer, BinaryLayer) else 1.0 if isinstance(layer, PackedLayer) else 0.0
    return LayerSummary(
        name=plan.name,
        role=plan.role,
        unit=plan.unit,
        weight_bits=1 if binary and config.weights else 8 * layer.weight.element_size(),
        input_bits=1 if binary_input else 32,
        levels=_LEVELS[unsigned] if binary_input else "",
        frozen=frozen if binary else None,
        parameters=weights + biases,
        float_bytes=float_bytes,
        packed_bytes=packed_bytes,
        skipped=plan.skipped,
    )


def _tensor_row(plan: LayerPlan, tensor: Any) -> LayerSummary:
    """The row of a tensor that attention multiplies: nothing but thresholds and levels."""
    binary = not plan.skipped
    frozen = getattr(tensor, "fraction", 1.0) if binary else None
    return LayerSummary(
        name=plan.name,
        role=plan.role,
        unit=plan.unit,
        weight_bits=0,
        input_bits=1 if binary else 32,
        levels=_LEVELS[plan.unsigned] if binary else "",
        frozen=frozen,
        parameters=0,
        float_bytes=0,
        packed_bytes=4 * (tensor.input_features + 2) if binary else 0,
        skipped=plan.skipped,
    )


def _table_row(plan: LayerPlan, table: nn.Embedding, bits: int) -> LayerSummary:
    """A table's row; one that is not binarized in training is rounded to `bits` when it is packed. A packed one has
    its bits already, whatever the config says of others."""
    kept, fraction = "", table.fraction if isinstance(table, BinaryEmbedding) else 0.0
    if isinstance(table, PackedEmbedding):
        bits, fraction = table.bits, 1.0
    elif not plan.skipped:
        bits = 1
    elif bits == 32:
        bits, kept = 8 * table.weight.element_size(), f"{plan.skipped}, embedding_bits=32"
    entries = table.num_embeddings * table.embedding_dim
    scales = 0 if kept else 4 * table.num_embeddings
    return LayerSummary(
        name=plan.name,
        role="embedding",
        unit=plan.unit,
        weight_bits=bits,
        input_bits=32,
        levels="",
        frozen=None if plan.skipped else fraction,
        parameters=entries,
        float_bytes=4 * entries,
        packed_bytes=table.num_embeddings * packed_length(table.embedding_dim, bits) + scales,
        skipped=kept,
    )


def _rest_row(name: str, parameters: list[nn.Parameter], buffers: list[Tensor]) -> LayerSummary:
    count, more = sum(p.numel() for p in parameters), sum(b.nbytes for b in buffers)
    bits = 8 * max((p.element_size() for p in parameters), default=4)
    packed_bytes = sum(p.nbytes for p in parameters) + more
    return LayerSummary(name, "", None, bits, 32, "", None, count, 4 * count + more, packed_bytes, "never binarized")
