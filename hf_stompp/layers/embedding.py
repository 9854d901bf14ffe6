"""The packed embedding table: a few bits an entry, a scale for each row, looked up without unpacking the table."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.packing import pack_codes, packed_length, quantize_rows, unpack_codes


class PackedEmbedding(nn.Embedding):
    r"""An embedding table of 1, 4, 8 or 16 bits an entry: \\(y_d = s_v (2 c_{vd} - 2^b + 1)\\) for token v.

    It *is* an `nn.Embedding` whose `weight` is the bits, as [`PackedLinear`] is an `nn.Linear`. Only the rows that are
    looked up are unpacked, so that in memory the table is as small as in the file.

    Attributes:
        weight (`Parameter`): uint8 `[num_embeddings, ceil(embedding_dim * bits / 8)]`, as
            [`~hf_stompp.packing.pack_codes`].
        weight_scale (`Tensor`): float32 `[num_embeddings]`, in a half-precision model too: it may be below what half
            precision resolves.
        bits (`int`): Bits of an entry.
        dtype (`torch.dtype`): Of the output.
    """

    bits: int
    dtype: torch.dtype
    weight_scale: Tensor

    @classmethod
    def empty(cls, embedding: nn.Embedding, bits: int) -> Self:
        """A table of the shape of `embedding`, on its device, whose tensors are still to be filled in."""
        table = cls.__new__(cls)
        nn.Module.__init__(table)
        table.num_embeddings, table.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        table.padding_idx, table.bits, table.dtype = embedding.padding_idx, bits, embedding.weight.dtype
        # What nn.Embedding's repr asks for: rules of its training, which is over.
        table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse = None, 2.0, False, False
        table.train(embedding.training)
        shape, device = (table.num_embeddings, packed_length(table.embedding_dim, bits)), embedding.weight.device
        table.weight = nn.Parameter(torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False)
        table.register_buffer("weight_scale", torch.ones(table.num_embeddings, dtype=torch.float32, device=device))
        return table

    @classmethod
    @torch.no_grad()
    def from_float(cls, embedding: nn.Embedding, bits: int) -> Self:
        """Packs a full-precision table."""
        table = cls.empty(embedding, bits)
        codes, scale = quantize_rows(embedding.weight, bits)
        table.weight.copy_(pack_codes(codes, bits))
        table.weight_scale.copy_(scale)
        return table

    def to_float(self) -> nn.Embedding:
        """The `nn.Embedding` of the same values."""
        table = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        table.weight = nn.Parameter(self._rows(self.weight, self.weight_scale))
        return table.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        # Not by indexing, which takes negative tokens.
        packed = nn.functional.embedding(input, self.weight)
        return self._rows(packed, self.weight_scale[input])

    def _rows(self, packed: Tensor, scale: Tensor) -> Tensor:
        codes = unpack_codes(packed, self.embedding_dim, self.bits).to(torch.float32)
        levels = codes.mul_(2).sub_((1 << self.bits) - 1)
        return levels.mul_(scale.unsqueeze(-1)).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.dtype = fn(torch.zeros(0, dtype=self.dtype, device=scale.device)).dtype
        self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.bits}"
