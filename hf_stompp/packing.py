"""Tensor ↔ bits: the layout of packed weights and embedding tables.

A *code* is an unsigned integer of 1, 4, 8 or 16 bits. The last axis is packed without gaps, least significant bit
first: with `b` bits a code, entry `k` is in the bits `k·b` to `k·b + b - 1` of its row, and bit `i` of a row is bit
`i % 8` of byte `i // 8`. The last byte is padded with zeros. A weight has one bit, 1 for +1 and 0 for -1: its layout
is `numpy.packbits(w >= 0, axis=-1, bitorder="little")`.
"""

import torch
from torch import Tensor, nn


def packed_length(length: int, bits: int = 1) -> int:
    """Bytes that `length` codes take."""
    return (length * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs integers in [0, 2^bits) along the last axis: `[..., K]` → uint8 `[..., ceil(K·bits/8)]`.

    Example:

        >>> pack_codes(torch.tensor([[1, 2, 3]]), bits=4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    if bits == 16:
        return torch.stack([codes & 255, codes >> 8], dim=-1).to(torch.uint8).flatten(-2)
    per_byte = 8 // bits
    codes = nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per_byte))
    places = torch.tensor([1 << bits * i for i in range(per_byte)], dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, per_byte)) * places).sum(dim=-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, length: int, bits: int) -> Tensor:
    """The inverse of [`pack_codes`]: uint8 `[..., ceil(K·bits/8)]` → uint8, or int32 if `bits` is 16, `[..., K]`.

    Example:

        >>> unpack_codes(torch.tensor([[33, 3]], dtype=torch.uint8), length=3, bits=4)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    if bits == 16:
        low, high = packed.to(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
        return low + (high << 8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :length]


def pack_signs(x: Tensor) -> Tensor:
    """Packs the signs (`x >= 0`) of the last axis into bytes: `[..., K]` → uint8 `[..., ceil(K/8)]`.

    Example:

        >>> pack_signs(torch.tensor([[1.0, -1.0, 0.0, -2.0]]))
        tensor([[5]], dtype=torch.uint8)
    """
    return pack_codes(x >= 0, bits=1)


def unpack_signs(packed: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of [`pack_signs`]: uint8 `[..., ceil(K/8)]` → ±1 `[..., K]` of a float `dtype`, with `K = length`.

    Example:

        >>> unpack_signs(torch.tensor([[5]], dtype=torch.uint8), 4)
        tensor([[ 1., -1.,  1., -1.]])
    """
    # A byte at a time: one look-up makes eight entries.
    bytes_ = torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    signs = unpack_codes(bytes_, 8, bits=1).to(dtype).mul_(2).sub_(1)
    return nn.functional.embedding(packed.int(), signs).flatten(-2)[..., :length]


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    r"""The codes `[V, D]` and scales `[V]` of a table: \\(w_{vd} \approx s_v (2 c_{vd} - 2^b + 1)\\).

    The levels are the odd multiples of the scale, symmetric about 0, so that one rule holds for every width and 1 bit
    is `±s`. Codes and scale are fitted in turn, from the scale that just reaches the largest magnitude of the row: the
    nearest level for each entry, then the least-squares scale \\(s = \langle w, q \rangle / \langle q, q \rangle\\)
    for these levels. With 1 bit that is `mean |w|`, after one round.

    Args:
        weight (`Tensor`): Float `[V, D]`.
        bits (`int`): 1, 4, 8 or 16.
    """
    # Some rows at a time: the working copies of a whole table would take several times its memory.
    codes, scales = zip(*(_quantize_rows(rows.detach().float(), bits) for rows in weight.split(4096)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = (1 << bits) - 1
    scale = weight.abs().amax(dim=1, keepdim=True) / top
    for _ in range(10):
        # Rounded half up, so that 0 is +s as everywhere; a row of zeros has the scale 0.
        step = 2 * scale.clamp_min(torch.finfo(torch.float32).tiny)
        codes = (weight / step + (top + 1) / 2).floor_().clamp_(0, top)
        levels = 2 * codes - top
        scale = (weight * levels).sum(dim=1, keepdim=True) / levels.square().sum(dim=1, keepdim=True)
    return codes.to(torch.int32), scale.squeeze(1)
