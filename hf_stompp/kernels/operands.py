"""What a packed layer multiplies its inputs with, and which shapes go together."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_stompp.packing import packed_length

PANELS = "_hf_stompp_panels"
"""The attribute of a weight that keeps what is laid out of it for the kernels."""


class Operands(NamedTuple):
    r"""The tensors of a packed layer: \\(y = \hat x \, (s \odot \operatorname{bits}(w))^\top + b\\).

    Attributes:
        weight (`Tensor`): uint8 `[N, ceil(K / 8)]`; see [`~hf_stompp.packing.pack_signs`].
        weight_scale (`Tensor`): s, float32 `[N]`.
        bias (`Tensor`, *optional*): b, `[N]`.
        threshold (`Tensor`, *optional*): float32, one for each feature of the input; without it the inputs are not
            binary.
        levels (`Tensor`, *optional*): float32 `[2]`, the lower and the upper level of the inputs.
        next_threshold (`Tensor`, *optional*): float32 `[N]`; with it the result is bits, of whether y is at or above.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    threshold: Tensor | None
    levels: Tensor | None
    next_threshold: Tensor | None = None


def check_shapes(operands: Operands, row_length: int, features: int) -> None:
    """Raises a [`ValueError`] for shapes that do not fit inputs of so many features, and weights of `row_length`: what
    is not so would be read beyond its end."""
    outputs = len(operands.weight)
    expected = (outputs, packed_length(row_length)), (outputs,), (outputs,), (features,), (2,), (outputs,)
    for name, tensor, shape in zip(Operands._fields, operands, expected, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but that of a packed layer for this input is {shape}.")


def are_signed(levels: Tensor | None) -> bool:
    """Whether the levels of inputs are (-γ, γ), not (0, γ); without levels, as if they were (0, 1).

    Raises:
        ValueError: They are neither.
    """
    low, high = (0.0, 1.0) if levels is None else levels.tolist()
    if low not in (0, -high):
        raise ValueError(
            f"activation_levels is ({low}, {high}), but the kernels know (-γ, γ) and (0, γ) alone: set them to that, "
            'or compute the layer under kernels.use("reference").'
        )
    return low != 0


class Geometry(NamedTuple):
    """How a convolution goes over an image: each of height and width. Padding is of zeros."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of what comes out of an image of this height and width."""
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *self, strict=True))
        return height, width
