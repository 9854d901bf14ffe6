"""Layers: latent (`BinaryLinear`), packed (`PackedLinear`)."""

from hf_stompp.layers.binary import BinaryLinear
from hf_stompp.layers.packed import PackedLinear

__all__ = ["BinaryLinear", "PackedLinear"]
