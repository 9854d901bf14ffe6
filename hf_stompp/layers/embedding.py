"""Embedding tables: latent, on their way to 1 bit, and packed, looked up without unpacking the table."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.config import BinarizationConfig
from hf_stompp.functional import mix, weight_scale
from hf_stompp.layers.latent import LatentWeight
from hf_stompp.packing import pack_codes, pack_signs, packed_length, quantize_rows, unpack_codes


class BinaryEmbedding(LatentWeight, nn.Embedding):
    r"""An embedding table that is on its way to 1 bit: \\(y = \hat w_v\\) for token v, with a scale for each row.

    `ŵ` is the mixture of frozen and soft entries of [`~hf_stompp.functional.mix`], with
    \\(α_v = \operatorname{mean}_d |w_{vd}|\\) whatever the config's `scale` is: rows differ too much for one. Only
    the rows that are looked up are mixed.

    Attributes:
        weight (`Parameter`): Latent table `[num_embeddings, embedding_dim]`, and its mask: see [`LatentWeight`].
        dtype (`torch.dtype`): Of the output.

    Source: arXiv 2601.22660 for the method; 1-bit tables are in BinaryBERT (Bai et al., 2021) and BiT (Liu et al.,
    2022).
    """

    dtype: torch.dtype

    @classmethod
    def from_float(cls, embedding: nn.Embedding, config: BinarizationConfig, *, key: str, unit: int) -> Self:
        """Makes the table around the weight of `embedding`, on its device; see [`BinaryLinear.from_float`]."""
        table = cls.__new__(cls)
        nn.Module.__init__(table)
        _copy_attributes(embedding, table)
        table._adopt(embedding.weight, config, key, unit)
        return table

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.shape != self.weight_mask.shape:
            raise ValueError(
                f"The table {self.key} was resized to {tuple(self.weight.shape)}, but its mask is "
                f"{tuple(self.weight_mask.shape)}: call resize_token_embeddings before the model is binarized."
            )
        rows = nn.functional.embedding(input, self.weight, self.padding_idx).flatten(0, -2)
        mask = self._mask(self.weight_mask)
        if isinstance(mask, Tensor):
            mask = mask[input.flatten()]
        scale = weight_scale(rows, "channel").to(rows.dtype)
        mixed = mix(rows, scale, mask, clip=self.config.weight_clip, ste=self.config.surrogate == "ste")
        return mixed.view(*input.shape, self.embedding_dim).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = _cast_by(fn, self.dtype, self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unit={self.unit}, frozen={self.fraction:.3f}"


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
        _copy_attributes(embedding, table)
        table.bits = bits
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

    @classmethod
    @torch.no_grad()
    def from_binary(cls, latent: BinaryEmbedding) -> Self:
        """Packs a latent table, taking every entry as frozen."""
        table = cls.empty(latent, bits=1)
        table.weight.copy_(pack_signs(latent.weight))
        table.weight_scale.copy_(weight_scale(latent.weight, "channel").flatten())
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
        self.dtype = _cast_by(fn, self.dtype, scale.device)
        self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.bits}"


def _copy_attributes(embedding: nn.Embedding, table: BinaryEmbedding | PackedEmbedding) -> None:
    """All but the weight."""
    table.num_embeddings, table.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
    table.padding_idx = embedding.padding_idx
    # What nn.Embedding's repr asks for; tables with these rules are not binarized.
    table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse = None, 2.0, False, False
    table.dtype = getattr(embedding, "dtype", embedding.weight.dtype)
    table.train(embedding.training)


def _cast_by(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What `fn`, which `Module._apply` gives to each tensor, makes of a `dtype`."""
    return fn(torch.zeros(0, dtype=dtype, device=device)).dtype
