"""Layers: latent (`BinaryLinear`, `BinaryConv2d`, `BinaryEmbedding`, `BinaryActivation`), packed (`PackedLinear`,
`PackedConv2d`, `PackedEmbedding`, `PackedActivation`), dequantized (`BinaryInputLinear`, `BinaryInputConv2d`); and
which of them stands for which."""

from torch import nn

from hf_stompp.layers.activation import AttentionTensor, BinaryActivation, FloatActivation, LatentInput
from hf_stompp.layers.binary import BinaryConv2d, BinaryLayer, BinaryLinear
from hf_stompp.layers.embedding import BinaryEmbedding, PackedEmbedding
from hf_stompp.layers.latent import LatentLayer, LatentWeight
from hf_stompp.layers.packed import (
    BinaryInput,
    BinaryInputConv2d,
    BinaryInputLinear,
    PackedActivation,
    PackedConv2d,
    PackedLayer,
    PackedLinear,
)

BINARY: dict[type[nn.Module], type[BinaryLayer]] = {nn.Linear: BinaryLinear, nn.Conv2d: BinaryConv2d}
"""Full-precision → latent layer. A new kind of layer is a row here and in the next two."""
PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    BinaryLinear: PackedLinear,
    BinaryConv2d: PackedConv2d,
}
"""Full-precision and latent → packed layer."""
BINARY_INPUT: dict[type[nn.Module], type[BinaryInput]] = {
    PackedLinear: BinaryInputLinear,
    PackedConv2d: BinaryInputConv2d,
}
"""Packed → dequantized layer with binary inputs."""

__all__ = [
    "AttentionTensor",
    "BINARY",
    "BINARY_INPUT",
    "PACKED",
    "BinaryActivation",
    "BinaryConv2d",
    "BinaryEmbedding",
    "BinaryInput",
    "BinaryInputConv2d",
    "BinaryInputLinear",
    "BinaryLayer",
    "BinaryLinear",
    "FloatActivation",
    "LatentInput",
    "LatentLayer",
    "LatentWeight",
    "PackedActivation",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
]
