"""Layers: latent (`BinaryLinear`), packed (`PackedLinear`, `PackedEmbedding`), dequantized (`BinaryInputLinear`)."""

from hf_stompp.layers.binary import BinaryLinear
from hf_stompp.layers.embedding import PackedEmbedding
from hf_stompp.layers.packed import BinaryInputLinear, PackedLinear

__all__ = ["BinaryInputLinear", "BinaryLinear", "PackedEmbedding", "PackedLinear"]
