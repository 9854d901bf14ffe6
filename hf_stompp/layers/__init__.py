"""Layers: latent (`BinaryLinear`, `BinaryEmbedding`), packed (`PackedLinear`, `PackedEmbedding`), dequantized
(`BinaryInputLinear`)."""

from hf_stompp.layers.binary import BinaryLinear
from hf_stompp.layers.embedding import BinaryEmbedding, PackedEmbedding
from hf_stompp.layers.latent import LatentLayer
from hf_stompp.layers.packed import BinaryInputLinear, PackedLinear

__all__ = ["BinaryEmbedding", "BinaryInputLinear", "BinaryLinear", "LatentLayer", "PackedEmbedding", "PackedLinear"]
