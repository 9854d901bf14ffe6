"""Layers: latent (`BinaryLinear`, `BinaryConv2d`, `BinaryEmbedding`), packed (`PackedLinear`, `PackedConv2d`,
`PackedEmbedding`), dequantized (`BinaryInputLinear`, `BinaryInputConv2d`); and which of them stands for which."""

from torch import nn

from hf_stompp.layers.binary import BinaryConv2d, BinaryLayer, BinaryLinear
from hf_stompp.layers.embedding import BinaryEmbedding, PackedEmbedding
from hf_stompp.layers.latent import LatentLayer
from hf_stompp.layers.packed import (
    BinaryInput,
    BinaryInputConv2d,
    BinaryInputLinear,
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
    "BINARY",
    "BINARY_INPUT",
    "PACKED",
    "BinaryConv2d",
    "BinaryEmbedding",
    "BinaryInput",
    "BinaryInputConv2d",
    "BinaryInputLinear",
    "BinaryLayer",
    "BinaryLinear",
    "LatentLayer",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
]
