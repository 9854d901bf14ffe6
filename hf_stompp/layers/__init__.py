"""Layers: latent (`BinaryLinear`), packed (`PackedLinear`, `PackedEmbedding`)."""

from hf_stompp.layers.binary import BinaryLinear
from hf_stompp.layers.embedding import PackedEmbedding
from hf_stompp.layers.packed import PackedLinear

__all__ = ["BinaryLinear", "PackedEmbedding", "PackedLinear"]
