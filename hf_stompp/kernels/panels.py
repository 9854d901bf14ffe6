"""A packed layer as the kernels read it, laid out once.

A weight of bits, uint8 `[N, ceil(K / 8)]`, becomes panels of 64 outputs, uint32 `[ceil(N / 64), words, 64]`: see
`hf_stompp.kernels.vectors`. A convolution's bits are regrouped, so that each place of its kernel begins with a word.
What is beyond K and N is 0.
"""

import threading
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from hf_stompp.kernels.blocks import WIDTH
from hf_stompp.kernels.operands import PANELS, Operands, are_signed, check_shapes
from hf_stompp.kernels.processor import counts_nibbles

_making = threading.Lock()
"""The first requests to a server come at the same time, and one of them is to do it."""


class Panels:
    """The panels of a weight, and what goes with each of their outputs.

    Attributes:
        made_of (`list[int]`): Places, features and weights to a word, and addresses and versions of the tensors, which
            are kept alive, so that no other one gets the address of one of them.
        blocks, outputs, features (`int`): How many panels there are; N; features of an input.
        signed (`bool`): Whether the levels of the inputs are (-γ, γ), not (0, γ).
        above (`bool`): Whether there is a next threshold.
        counts (`Tensor`): int32 `[places, 64 · blocks]`: how many bits are set in each place of the kernel, of which a
            linear layer has one.
        at (`tuple[int, …]`): Addresses of the panels; of what population counts are taken off, int32 `[64 · blocks]`;
            of γ s, the bias and the next threshold, float32 `[64 · blocks]`, the last 0 without one; and of the
            thresholds of the inputs, 0 without.
    """

    def __init__(self, made_of: list[int], operands: Operands, places: int, features: int, per_word: int) -> None:
        check_shapes(operands, places * features, features)
        weight, weight_scale, bias, threshold, levels, next_threshold = operands
        self.made_of, self.outputs, self.features = made_of, len(weight), features
        words, self.blocks = -(-features // per_word), (self.outputs + WIDTH - 1) // WIDTH
        # torch begins its tensors where a line of the cache begins.
        ints: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}  # also if default is another
        bits = torch.zeros(self.blocks, places * words, WIDTH, **ints)
        self.counts = torch.zeros(places, self.blocks * WIDTH, **ints)
        rows = weight.detach().contiguous().numpy()
        _fill(rows, places, features, per_word, bits.numpy().view(np.uint32), self.counts.numpy())
        if threshold is not None and counts_nibbles():
            of_bytes = bits.view(torch.uint8).unflatten(-1, (WIDTH, 4))
            bits = of_bytes.transpose(-1, -2).contiguous()
        self.signed, high = are_signed(levels), 1.0 if levels is None else levels[1].item()
        whole = torch.full((self.blocks * WIDTH,), places * features, **ints)
        offsets = whole if self.signed else self.counts.sum(dim=0, dtype=torch.int32)
        gain = self._padded(weight_scale.detach().float() * high, 0)
        biases = self._padded(gain.new_zeros(self.outputs) if bias is None else bias.detach().float(), 0)
        # What is beyond the last output is below its threshold.
        above = None if next_threshold is None else self._padded(next_threshold.float(), torch.inf)
        own = None if threshold is None else threshold.float().contiguous().clone()
        self._sources = [x.detach() for x in operands if x is not None]
        self._copies = [x.clone() for x in self._sources if x.is_inference()]
        self._tensors = bits, offsets, gain, biases, above, own  # whose addresses are given out
        self.above = above is not None
        self.at = tuple(0 if tensor is None else tensor.data_ptr() for tensor in self._tensors)

    def are_of(self, made_of: list[int], unversioned: list[Tensor]) -> bool:
        """Whether they are still what would be made. Tensors from inference mode, which count no versions, are held
        against what they were."""
        return self.made_of == made_of and all(map(torch.equal, unversioned, self._copies))

    def __reduce__(self) -> Any:
        return type(None), ()  # addresses are this process's: a copy of the weight makes its own

    def _padded(self, values: Tensor, beyond: float) -> Tensor:
        out = torch.full((self.blocks * WIDTH,), beyond, dtype=torch.float32, device="cpu")
        out[: self.outputs] = values
        return out


def panels(operands: Operands, places: int, features: int, per_word: int = 32) -> Panels:
    """The [`Panels`] of a layer, with so many weights to a word: made at the first call, and anew after a tensor of it
    was written to or moved. They are kept on the weight, and go with it."""
    made_of, unversioned = [places, features, per_word], []
    for tensor in operands:
        if tensor is not None:
            made_of += tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
            if tensor.is_inference():
                unversioned.append(tensor)
    kept: Panels | None = getattr(operands.weight, PANELS, None)
    if kept is None or not kept.are_of(made_of, unversioned):
        with _making, torch.no_grad():
            kept = getattr(operands.weight, PANELS, None)
            if kept is None or not kept.are_of(made_of, unversioned):
                kept = Panels(made_of, operands, places, features, per_word)
                setattr(operands.weight, PANELS, kept)
    return kept


@numba.njit("void(uint8[:, ::1], intp, intp, intp, uint32[:, :, ::1], int32[:, ::1])", nogil=True, cache=True)
def _fill(rows, places, features, per_word, bits, counts):  # type: ignore[no-untyped-def]
    words = (features + per_word - 1) // per_word
    for n in range(len(rows)):
        for place in range(places):
            for k in range(features):
                at = place * features + k
                if rows[n, at // 8] >> (at % 8) & 1:
                    word = place * words + k // per_word
                    bits[n // WIDTH, word, n % WIDTH] |= np.uint32(1) << np.uint32(k % per_word)
                    counts[place, n] += 1
