"""Tensor ↔ bits: the layout of a packed weight.

One bit a weight: bit 1 is +1, bit 0 is -1. The last axis is packed, eight entries to a byte, entry `k` in bit `k % 8`
(least significant first) of byte `k // 8`; the last byte is padded with zeros. This is
`numpy.packbits(w >= 0, axis=-1, bitorder="little")`.
"""

import torch
from torch import Tensor

_BIT_VALUES = [1, 2, 4, 8, 16, 32, 64, 128]


def packed_length(length: int) -> int:
    """Bytes that `length` bits take."""
    return (length + 7) // 8


def pack_signs(x: Tensor) -> Tensor:
    """Packs the signs (`x >= 0`) of the last axis into bytes: `[..., K]` → uint8 `[..., ceil(K/8)]`.

    Example:

        >>> pack_signs(torch.tensor([[1.0, -1.0, 0.0, -2.0]]))
        tensor([[5]], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=x.device)
    return (bits.unflatten(-1, (-1, 8)) * values).sum(dim=-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, length: int) -> Tensor:
    """The inverse of [`pack_signs`]: uint8 `[..., ceil(K/8)]` → float32 ±1 `[..., K]`, with `K = length`.

    Example:

        >>> unpack_signs(torch.tensor([[5]], dtype=torch.uint8), 4)
        tensor([[ 1., -1.,  1., -1.]])
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :length].to(torch.float32) * 2 - 1
