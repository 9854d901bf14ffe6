"""Packed layers by the kernels, and as the operators `torch.ops.hf_stompp.packed_linear` and `packed_conv2d`, for
torch.compile, torch.export and gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_stompp import kernels
from hf_stompp.packing import packed_length, unpack_signs

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_PLAIN = Tensor, nn.Parameter
_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # as under vmap


def cover(input: Tensor, axis: int, features: int, binary_input: bool) -> bool:
    """Whether the kernels take this input of a layer, which has so many features on that axis; the reference does all
    else, and reports errors."""
    dtype, shape = input.dtype, input.shape
    if input.device.type != "cpu" or len(shape) < -axis or (axis == -3 and len(shape) != 4):
        return False
    compiling = torch.compiler.is_compiling()
    if dtype == torch.int32 and binary_input:  # bits, of another layer; of two words for each of its panels
        return not compiling and shape[axis] == 2 * ((features + 63) // 64)
    if dtype not in _DTYPES or shape[axis] != features:
        return False
    if not compiling and (type(input) not in _PLAIN or torch.jit.is_tracing() or _is_functorch_wrapped(input)):
        return False
    return _available(binary_input)


@torch.compiler.assume_constant_result
def _available(binary_input: bool) -> bool:
    return kernels.backend() == "cpu" and (binary_input or kernels.loaded("vectors").has_lookup())


def linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    levels: Tensor | None,
    next_threshold: Tensor | None,
) -> Tensor:
    """[`packed_linear`] for inputs that [`cover`] covers; as an operator only where one is needed, for it takes as
    long as a small layer. Under autocast the result has its dtype, as that of `nn.functional.linear`. Bits are handed
    on in float32 models, where nothing keeps gradients."""
    operands = input, weight, weight_scale, bias, threshold, levels
    if _as_operator(input, bias):
        return _cast(packed_linear(*operands))
    return _cast(_linear(*operands, _handed_on(input, next_threshold)))


def _as_operator(input: Tensor, bias: Tensor | None) -> bool:
    needs_grad = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
    return needs_grad or torch.compiler.is_compiling()


def _handed_on(input: Tensor, next_threshold: Tensor | None) -> Tensor | None:
    """The next threshold, where bits may be handed on: they do not tell which half precision the model has."""
    whole = input.dtype in (torch.float32, torch.int32) and not torch.is_autocast_enabled("cpu")
    return next_threshold if whole and not torch.is_grad_enabled() else None


def _cast(out: Tensor) -> Tensor:
    floats = out.dtype != torch.int32 and torch.is_autocast_enabled("cpu")
    return out.to(torch.get_autocast_dtype("cpu")) if floats else out


def _linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    levels: Tensor | None,
    next_threshold: Tensor | None = None,
) -> Tensor:
    if threshold is None or levels is None:
        return kernels.loaded("weights").linear(input, weight, weight_scale, bias)
    binary = kernels.loaded("binary")
    operands = weight, weight_scale, bias, threshold, levels, next_threshold
    if input.dtype == torch.float16:  # exact: the comparisons are made in float32
        return binary.linear(input.float(), *operands).half()
    return binary.linear(input, *operands)


@torch.library.custom_op("hf_stompp::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    levels: Tensor | None,
) -> Tensor:
    r"""\\(y = \hat x \, (s \odot \operatorname{bits}(w))^\top + b\\) by the kernels for a CPU.

    Args:
        input (`Tensor`): float32, bfloat16 or float16 `[…, K]`.
        weight (`Tensor`): uint8 `[N, ceil(K / 8)]`; see [`~hf_stompp.packing.pack_signs`].
        weight_scale (`Tensor`): float32 `[N]`.
        bias (`Tensor`, *optional*): `[N]`.
        threshold (`Tensor`, *optional*): float32 `[K]`; without it the inputs are not binary.
        levels (`Tensor`, *optional*): float32 `[2]`, the lower and the upper level of the inputs.

    Returns:
        `Tensor`: `[…, N]`, in the dtype of the input.

    Raises:
        ValueError: A shape is not as above.
    """
    _check_shapes(input.shape[-1], input.shape[-1], weight, weight_scale, bias, threshold, levels)
    return _linear(input, weight, weight_scale, bias, threshold, levels)


def _check_shapes(row_length: int, features: int, weight: Tensor, *others: Tensor | None) -> None:
    """What is not so would be read beyond its end."""
    outputs = len(weight)
    names = "weight", "weight_scale", "bias", "threshold", "levels"
    expected = (outputs, packed_length(row_length)), (outputs,), (outputs,), (features,), (2,)
    for name, tensor, shape in zip(names, (weight, *others), expected, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but that of a packed layer for this input is {shape}.")


@packed_linear.register_fake
def _(input, weight, weight_scale, bias, threshold, levels):  # type: ignore[no-untyped-def]
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    input, weight, weight_scale, bias, threshold, _ = inputs
    ctx.features, ctx.binary, ctx.bias_dtype = input.shape[-1], threshold is not None, bias is not None and bias.dtype
    ctx.save_for_backward(weight, weight_scale)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Of a binary input there is none: it is a step."""
    to_input = to_bias = None
    if ctx.needs_input_grad[0] and not ctx.binary:
        weight, scale = ctx.saved_tensors
        dense = unpack_signs(weight, ctx.features, grad.dtype).mul_(scale.to(grad.dtype).unsqueeze(1))
        to_input = grad @ dense
    if ctx.needs_input_grad[3]:
        to_bias = grad.flatten(0, -2).sum(dim=0).to(ctx.bias_dtype)
    return to_input, None, None, to_bias, None, None


packed_linear.register_autograd(_backward, setup_context=_save)


def conv2d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    levels: Tensor,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    next_threshold: Tensor | None,
) -> Tensor:
    """[`packed_conv2d`], as [`linear`] is [`packed_linear`]; `geometry` is kernel size, stride, padding, dilation."""
    operands = input, weight, weight_scale, bias, threshold, levels, *geometry
    if _as_operator(input, bias):
        return _cast(packed_conv2d(*operands))
    return _cast(_conv2d(*operands, _handed_on(input, next_threshold)))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    levels: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    next_threshold: Tensor | None = None,
) -> Tensor:
    convolution = kernels.loaded("convolution")
    operands = weight, weight_scale, bias, threshold, levels, kernel, stride, padding, dilation, next_threshold
    if input.dtype == torch.float16:
        return convolution.conv2d(input.float(), *operands).half()
    return convolution.conv2d(input, *operands)


@torch.library.custom_op("hf_stompp::packed_conv2d", mutates_args=(), device_types="cpu")
def packed_conv2d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    levels: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    r"""\(y = \hat x * (s \odot \operatorname{bits}(w)) + b\) by the kernels for a CPU, without groups.

    Args:
        input (`Tensor`): float32, bfloat16 or float16 `[B, C, H, W]`.
        weight (`Tensor`): uint8 `[N, ceil(K / 8)]`, K = kernel height · kernel width · C, in this order.
        weight_scale, bias, threshold, levels (`Tensor`): As of [`packed_linear`]; thresholds `[C]`.
        kernel, stride, padding, dilation (`Sequence[int]`): Of height and width. Padding is of zeros.

    Returns:
        `Tensor`: `[B, N, …, …]`, in the dtype of the input, with the channels last in memory.

    Raises:
        ValueError: A shape is not as above.
    """
    channels = input.shape[1]
    _check_shapes(kernel[0] * kernel[1] * channels, channels, weight, weight_scale, bias, threshold, levels)
    return _conv2d(input, weight, weight_scale, bias, threshold, levels, kernel, stride, padding, dilation)


@packed_conv2d.register_fake
def _(input, weight, weight_scale, bias, threshold, levels, kernel, stride, padding, dilation):  # type: ignore
    sizes = zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    return input.new_empty((input.shape[0], height, width, weight.shape[0])).permute(0, 3, 1, 2)


def _save_bias(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.bias_dtype = inputs[3] is not None and inputs[3].dtype


def _bias_backward(ctx, grad):  # type: ignore[no-untyped-def]
    to_bias = grad.sum(dim=(0, 2, 3)).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return None, None, None, to_bias, *[None] * 6


packed_conv2d.register_autograd(_bias_backward, setup_context=_save_bias)
