"""Packed layers by the kernels, and as the operators `torch.ops.hf_stompp.packed_linear` and `packed_conv2d`, for
torch.compile, torch.export and gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from hf_stompp import kernels
from hf_stompp.functional import pass_straight
from hf_stompp.kernels.operands import PANELS, Geometry, Operands, check_shapes
from hf_stompp.packing import unpack_signs

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_PLAIN = Tensor, nn.Parameter
_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # as under vmap


def cover(input: Tensor, axis: int, features: int, binary_input: bool, takes_bits: bool) -> bool:
    """Whether the kernels take this input of a layer, which has so many features on that axis, or, if another layer
    hands bits on to it, these; the reference does all else, and reports errors."""
    dtype, shape, device = input.dtype, input.shape, input.device
    if device.type != "cpu" and not (device.type == "cuda" and axis == -1 and binary_input):
        return False
    if len(shape) < -axis or (axis == -3 and len(shape) != 4):
        return False
    compiling = torch.compiler.is_compiling()
    if dtype == torch.int32 and takes_bits and device.type == "cpu":
        # Of two words for each panel of the other layer.
        return not compiling and shape[axis] == 2 * ((features + 63) // 64)
    if dtype not in _DTYPES or shape[axis] != features:
        return False
    if not compiling and (type(input) not in _PLAIN or _recorded(input)):
        return False
    return _available(binary_input) if device.type == "cpu" else _available_on_gpu(device.index)


def backend(device: torch.device, axis: int, binary_input: bool) -> str:
    """What computes a layer that [`cover`] asks of, on this device: `"cpu"`, `"triton"` or `"reference"`; or what
    keeps it from being computed. Nothing is compiled to find out."""
    try:
        if device.type == "cpu" and kernels.expected() == "cpu":
            return "cpu" if binary_input or kernels.loaded("processor").features_of_lookup() else "reference"
        on_gpu = device.type == "cuda" and axis == -1 and binary_input and _available_on_gpu(device.index)
    except ValueError:
        return "none, for HF_STOMPP_KERNELS is wrong"
    except RuntimeError:
        return "triton, which does not work here"
    return "triton" if on_gpu else "reference"


def forget(weight: Tensor) -> None:
    """Frees what was laid out of a weight for the kernels."""
    vars(weight).pop(PANELS, None)


@torch.compiler.assume_constant_result
def _available(binary_input: bool) -> bool:
    return kernels.backend() == "cpu" and (binary_input or kernels.loaded("processor").features_of_lookup() > 0)


@torch.compiler.assume_constant_result
def _available_on_gpu(index: int) -> bool:
    return kernels.on_gpu(index)


def linear(input: Tensor, operands: Operands, clip: float = 0.0) -> Tensor:
    """[`packed_linear`] for inputs that [`cover`] covers; as an operator only where one is needed, for it takes as
    long as a small layer. Under autocast the result has its dtype, as that of `nn.functional.linear`."""
    if as_operator(input, operands):
        return _cast(packed_linear(input, *operands[:5], clip))
    if input.device.type == "cuda":
        return _cast(kernels.loaded("gpu").linear(input, operands))
    return _cast(_linear(input, _handing_on(operands)))


def conv2d(input: Tensor, operands: Operands, geometry: Geometry, clip: float = 0.0) -> Tensor:
    """[`packed_conv2d`], as [`linear`] is [`packed_linear`]."""
    if as_operator(input, operands):
        return _cast(packed_conv2d(input, *operands[:5], *geometry, clip))
    return _cast(kernels.loaded("convolution").conv2d(input, _handing_on(operands), geometry))


def as_operator(input: Tensor, operands: Operands) -> bool:
    """Whether gradients or a graph are made, which know operators alone."""
    bias = operands.bias
    needs_grad = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
    return needs_grad or torch.compiler.is_compiling()


def cover_dense(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels make float weights of these bits."""
    plain = dtype == torch.float32 and weight.device.type == "cpu" and type(weight) in _PLAIN
    return plain and not _recorded(weight) and kernels.backend() == "cpu"


def dense_rows(weight: Tensor, scale: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """±s, `[N, K]` with K = `length`, of bits, uint8 `[N, ceil(K / 8)]`, and scales `[N]`: the same values from all
    backends."""
    if cover_dense(weight, dtype):
        out: Tensor = kernels.loaded("dense").dense(weight, scale, length)
        return out
    # In place and at once in `dtype`, which gives the same values: what the allocator keeps of copies would be several
    # times the packed model.
    return unpack_signs(weight, length, dtype).mul_(scale.to(dtype).unsqueeze(1))


def cover_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> bool:
    """Whether [`add_norm`] takes these; what makes gradients or a graph is for torch."""
    if type(norm) is not nn.LayerNorm or norm.bias is None:
        return False
    tensors = x, residual, norm.weight, norm.bias
    plain = all(t.dtype == torch.float32 and t.is_cpu and type(t) in _PLAIN for t in tensors)
    alike = x.shape == residual.shape and x.shape[-1:] == norm.weight.shape == norm.bias.shape
    compact = norm.weight.is_contiguous() and norm.bias.is_contiguous()
    unheard = torch.is_grad_enabled() or any(_recorded(tensor) for tensor in tensors)
    return plain and alike and compact and not unheard and kernels.backend() == "cpu"


def add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    r"""\\(\operatorname{LayerNorm}(x + r)\\), for what [`cover_norm`] covers."""
    out: Tensor = kernels.loaded("normalization").add_norm(x, residual, norm.weight, norm.bias, norm.eps)
    return out


def _recorded(tensor: Tensor) -> bool:
    """Whether what is done to a tensor is written down, as operations: kernels are none."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return recorded or _is_functorch_wrapped(tensor)


def _handing_on(operands: Operands) -> Operands:
    """Without the next threshold where bits may not be handed on: floats are looked for there, or rounded first."""
    if operands.next_threshold is not None and (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
        return operands._replace(next_threshold=None)
    return operands


def _cast(out: Tensor) -> Tensor:
    device = out.device.type
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


def _linear(input: Tensor, operands: Operands) -> Tensor:
    if operands.threshold is None and not _available(binary_input=False):  # made elsewhere, and brought here
        weight = dense_rows(operands.weight, operands.weight_scale, input.shape[-1], input.dtype)
        return nn.functional.linear(input, weight, operands.bias)
    module = "weights" if operands.threshold is None else "binary"
    out: Tensor = kernels.loaded(module).linear(input, operands)
    return out


@torch.library.custom_op("hf_stompp::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    levels: Tensor | None,
    clip: float = 0.0,
) -> Tensor:
    r"""\\(y = \hat x \, (s \odot \operatorname{bits}(w))^\top + b\\) by the kernels for a CPU, or for a GPU.

    Args:
        input (`Tensor`): float32, bfloat16 or float16 `[…, K]`.
        weight, weight_scale, bias, threshold, levels (`Tensor`): See [`~hf_stompp.kernels.operands.Operands`].
        clip (`float`): κ of the straight-through gradient of a binary input (see
            [`~hf_stompp.functional.pass_straight`]); with 0 there is none.

    Returns:
        `Tensor`: `[…, N]`, in the dtype of the input.

    Raises:
        ValueError: A shape is not as there.
    """
    operands = Operands(weight, weight_scale, bias, threshold, levels)
    check_shapes(operands, input.shape[-1], input.shape[-1])
    return _linear(input, operands)


@packed_linear.register_kernel("cuda")
def _(input, weight, weight_scale, bias, threshold, levels, clip=0.0):  # type: ignore[no-untyped-def]
    operands = Operands(weight, weight_scale, bias, threshold, levels)
    check_shapes(operands, input.shape[-1], input.shape[-1])
    if threshold is None:
        dense = dense_rows(weight, weight_scale, input.shape[-1], input.dtype)
        return torch.nn.functional.linear(input, dense, bias)
    return kernels.loaded("gpu").linear(input, operands)


@packed_linear.register_fake
def _(input, weight, weight_scale, bias, threshold, levels, clip=0.0):  # type: ignore[no-untyped-def]
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    input, weight, weight_scale, bias, threshold, levels, clip, *geometry = inputs
    ctx.shape, ctx.clip, ctx.bias_dtype = input.shape, clip, bias is not None and bias.dtype
    passes = ctx.needs_input_grad[0] and (threshold is None or clip > 0)
    binary = (input, threshold, levels) if passes and threshold is not None else ()
    ctx.save_for_backward(*((weight, weight_scale, *binary) if passes else ()))


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Of a binary input without `clip` there is none: it is a step."""
    to_input = to_bias = None
    if saved := ctx.saved_tensors:  # once: what is checkpointed is computed again for it
        weight, scale, *binary = saved
        to_input = grad @ dense_rows(weight, scale, ctx.shape[-1], grad.dtype)
        if binary:
            input, threshold, levels = binary
            to_input = pass_straight(to_input, input, threshold, levels, ctx.clip)
    if ctx.needs_input_grad[3]:
        to_bias = grad.flatten(0, -2).sum(dim=0).to(ctx.bias_dtype)
    return to_input, None, None, to_bias, None, None, None


packed_linear.register_autograd(_backward, setup_context=_save)


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
    clip: float = 0.0,
) -> Tensor:
    r"""\\(y = \hat x * (s \odot \operatorname{bits}(w)) + b\\) by the kernels for a CPU, without groups.

    Args:
        input (`Tensor`): float32, bfloat16 or float16 `[B, C, H, W]`.
        weight, weight_scale, bias, threshold, levels (`Tensor`): See [`~hf_stompp.kernels.operands.Operands`]; K =
            kernel height · kernel width · C, in this order, and thresholds `[C]`.
        kernel, stride, padding, dilation (`Sequence[int]`): See [`~hf_stompp.kernels.operands.Geometry`].
        clip (`float`): As of [`packed_linear`].

    Returns:
        `Tensor`: `[B, N, …, …]`, in the dtype of the input, with the channels last in memory.

    Raises:
        ValueError: A shape is not as there.
    """
    operands, channels = Operands(weight, weight_scale, bias, threshold, levels), input.shape[1]
    check_shapes(operands, kernel[0] * kernel[1] * channels, channels)
    out: Tensor = kernels.loaded("convolution").conv2d(input, operands, Geometry(kernel, stride, padding, dilation))
    return out


@packed_conv2d.register_fake
def _(input, weight, weight_scale, bias, threshold, levels, kernel, stride, padding, dilation, clip=0.0):  # type: ignore
    size = Geometry(kernel, stride, padding, dilation).output_size(input.shape[2:])
    return input.new_empty((input.shape[0], *size, weight.shape[0])).permute(0, 3, 1, 2)


def _save_conv2d(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *operands, kernel, stride, padding, dilation, clip = inputs
    _save(ctx, (*operands, clip), output)
    ctx.geometry = Geometry(kernel, stride, padding, dilation)


def _backward_conv2d(ctx, grad):  # type: ignore[no-untyped-def]
    to_input = to_bias = None
    if saved := ctx.saved_tensors:  # once: what is checkpointed is computed again for it
        weight, scale, *binary = saved
        kernel, *geometry = ctx.geometry
        rows = dense_rows(weight, scale, kernel[0] * kernel[1] * ctx.shape[1], grad.dtype)
        kernels_first = rows.view(-1, *kernel, ctx.shape[1]).permute(0, 3, 1, 2)
        to_input = conv2d_input(ctx.shape, kernels_first, grad, *geometry)
        input, threshold, levels = binary
        to_input = pass_straight(to_input, input, threshold.view(-1, 1, 1), levels, ctx.clip)
    if ctx.needs_input_grad[3]:
        to_bias = grad.sum(dim=(0, 2, 3)).to(ctx.bias_dtype)
    return to_input, None, None, to_bias, *[None] * 7


packed_conv2d.register_autograd(_backward_conv2d, setup_context=_save_conv2d)
