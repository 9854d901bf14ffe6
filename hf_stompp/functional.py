"""The mathematics of one binarizable tensor: scale, clip, and the mixed forward with its two backward rules.

`sign(0) = +1` everywhere, so that one bit is enough: a sign is `x >= 0`, never `torch.sign`, whose third value has
no bit.

Pure functions of tensors: no modules, no configuration, no randomness. METHOD: Smith and Islam, arXiv 2601.22660 and
arXiv 2606.27759.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_stompp import kernels


def weight_scale(weight: Tensor, granularity: str) -> Tensor:
    r"""The scale α of a weight `[out, ...]`, broadcastable against it, in float32 and without gradient.

    `"channel"`: \\(α_n = \operatorname{mean}_k |w_{nk}|\\), the least-squares scale of `sign(w)` for each output
    channel (Rastegari et al., XNOR-Net, 2016); `"tensor"`: one mean for all entries; `"none"`: 1.
    """
    rows, shape = weight.detach().flatten(1), (-1,) + (1,) * (weight.dim() - 1)
    if granularity == "none":
        return torch.ones(rows.shape[0], dtype=torch.float32, device=weight.device).view(shape)
    if _to_kernel(rows):
        mean = kernels.loaded("mixing").row_means(rows)
    else:
        mean = torch.cat([part.abs().mean(dim=1, dtype=torch.float32) for (part,) in _blocks(rows)])
    if granularity == "tensor":
        mean = mean.mean().expand(rows.shape[0])
    return mean.view(shape)


def activation_threshold(scale: Tensor, shift: Tensor | None, unsigned: bool) -> Tensor:
    """The value from which on an input is the upper level: `γ/2` for levels {0, γ}, `β` (or 0) for {-γ, +γ}."""
    if unsigned:
        return scale / 2
    return torch.zeros_like(scale) if shift is None else shift


def pass_straight(grad: Tensor, x: Tensor, threshold: Tensor, levels: Tensor, clip: float) -> Tensor:
    r"""The straight-through gradient of a binary input: `grad` where \(|x - β| \le κγ\), or, of unsigned levels, where
    \(0 \le x \le κγ\); 0 elsewhere. As [`mix`] passes it with `ste`, of what a packed layer has.

    Args:
        grad, x (`Tensor`): Gradient of the binary input, and the input.
        threshold (`Tensor`): From where on an input is the upper level, broadcastable against `x`.
        levels (`Tensor`): `[2]`, the lower and the upper level.
        clip (`float`): κ.
    """
    low, high = levels.unbind()
    unsigned, reach = low == 0, clip * high  # no branch on it: graphs are made of this
    centre, reach = torch.where(unsigned, reach / 2, threshold), torch.where(unsigned, reach / 2, reach)
    return torch.where((x.float() - centre).abs() <= reach, grad, 0.0)


_BLOCK = 1 << 16
"""Entries worked on at a time on a CPU, if the first axis can be cut so: a few such float32 tensors fit the
second-level cache of one core."""


def _blocks(x: Tensor, *others: Any) -> Iterable[tuple[Any, ...]]:
    """`x` and what goes with it, cut alike along the first axis into pieces that stay in the cache from one operation
    to the next. What is broadcast along that axis, or is no tensor, goes with every piece as it is."""
    if x.device.type != "cpu" or x.numel() <= _BLOCK or torch.compiler.is_compiling():
        return [(x, *others)]
    rows = max(1, _BLOCK * x.shape[0] // x.numel())
    alike = (isinstance(t, Tensor) and t.dim() == x.dim() and t.shape[0] == x.shape[0] for t in others)
    parts = [t.split(rows) if cut else itertools.repeat(t) for t, cut in zip(others, alike, strict=True)]
    return zip(x.split(rows), *parts, strict=False)


def _hard(x: Tensor, scale: Tensor, unsigned: bool, out: Tensor) -> None:
    """The binary value of every entry. In-place arithmetic on 0/1 floats: `torch.where` on signs, which are as good as
    random, is ten times slower on a CPU (it branches)."""
    if unsigned:
        torch.sub(x, scale / 2, out=out).ge_(0).mul_(scale)
    else:
        torch.ge(x, 0, out=out).mul_(2 * scale).sub_(scale)


def _soft(x: Tensor, scale: Tensor, clip: float | None, unsigned: bool, out: Tensor) -> None:
    """The clipped value of every entry."""
    if clip is None:
        out.copy_(x)
        return
    upper = clip * scale
    torch.maximum(x, torch.zeros_like(upper) if unsigned else -upper, out=out)
    torch.minimum(out, upper, out=out)


def _mixed(x: Tensor, scale: Tensor, mask: Tensor | bool, clip: float | None, unsigned: bool, out: Tensor) -> None:
    """Hard where the mask is `True`, soft elsewhere."""
    if mask is True:
        _hard(x, scale, unsigned, out)
        return
    _soft(x, scale, clip, unsigned, out)
    if mask is not False:
        hard = torch.empty_like(out)
        _hard(x, scale, unsigned, hard)
        # lerp with weights 0 and 1 returns one end or the other exactly.
        torch.lerp(out, hard, mask.view(torch.uint8).to(x.dtype), out=out)


def _pass_inside(grad: Tensor, x: Tensor, scale: Tensor, clip: float | None, unsigned: bool, out: Tensor) -> None:
    """The gradient of the soft value: that of the entries which are not clipped."""
    if clip is None:
        out.copy_(grad)
    elif unsigned:
        torch.sub(clip * scale, x, out=out).mul_(x).ge_(0).mul_(grad)
    else:
        torch.abs(x, out=out).le_(clip * scale).mul_(grad)


def _to_kernel(x: Tensor) -> bool:
    """Whether this tensor is one for the kernels."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or kernels.backend() == "reference":
        return False
    fits: bool = kernels.loaded("mixing").fits(x)
    return fits


def _kernel(x: Tensor, scale: Tensor, mask: Tensor | bool, clip: float | None, shift: Tensor | None) -> Any:
    """The kernel module for these arguments, or None: then torch does it."""
    nothing_to_do = mask is False and clip is None and shift is None
    if nothing_to_do or not _to_kernel(x):
        return None
    mixing = kernels.loaded("mixing")
    return mixing if mixing.fits_with(x, scale, shift, mask) else None


class _Mix(torch.autograd.Function):
    """The frozen entries hard, the others soft; the gradient of `soft`, cut at frozen entries unless `ste`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        mask: Tensor | bool,
        clip: float | None,
        unsigned: bool,
        ste: bool,
    ) -> Tensor:
        kernel = _kernel(x, scale, mask, clip, shift)
        if mask is False and clip is None:
            y = x.view_as(x) if shift is None else x - shift
        elif kernel is not None:
            y = kernel.forward(x, scale, shift, mask, clip, unsigned)
        else:
            # In the memory order of x; a compiler can only write into a contiguous tensor.
            y = x.new_empty(x.shape) if torch.compiler.is_compiling() else torch.empty_like(x)
            for part, out, part_scale, frozen, part_shift in _blocks(x, y, scale, mask, shift):
                _mixed(_centred(part, part_shift), part_scale, frozen, clip, unsigned, out)
        values = y if ctx.needs_input_grad[1] and kernel is None else None
        ctx.save_for_backward(x, scale, shift, values, mask if isinstance(mask, Tensor) else None)
        ctx.kernel, ctx.all_frozen, ctx.clip, ctx.unsigned, ctx.ste = kernel, mask is True, clip, unsigned, ste
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, y, mask = ctx.saved_tensors
        grad_scale: Tensor | None
        if ctx.kernel is not None:
            frozen = ctx.all_frozen if mask is None else mask
            grad_x, grad_scale = ctx.kernel.backward(grad, x, scale, shift, frozen, ctx.clip, ctx.unsigned, ctx.ste)
        else:
            grad_x, grad_scale = _Mix._backward(ctx, grad, x, scale, shift, y, mask)
        grad_shift = -grad_x.sum_to_size(shift.shape) if ctx.needs_input_grad[2] else None
        return grad_x, grad_scale if ctx.needs_input_grad[1] else None, grad_shift, None, None, None, None

    @staticmethod
    def _backward(
        ctx: Any, grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, y: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        grad_x = x.new_empty(x.shape)
        grad_scale = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        blocks = _blocks(x, grad_x, grad, y, scale, mask, grad_scale, shift)
        for part, out, grad_y, value, part_scale, frozen, sums, part_shift in blocks:
            if ctx.all_frozen and not ctx.ste:
                out.zero_()
            else:
                _pass_inside(grad_y, _centred(part, part_shift), part_scale, ctx.clip, ctx.unsigned, out)
            # y is γ times a constant where frozen or clipped, and does not depend on γ elsewhere.
            soft = out if frozen is None else out * (1 - frozen.view(torch.uint8).to(grad.dtype))
            if sums is not None:
                constant = grad_y if ctx.all_frozen else grad_y - soft
                sums += (constant * value).sum_to_size(sums.shape) / part_scale
            if frozen is not None and not ctx.ste:
                out.copy_(soft)
        return grad_x, grad_scale


def _centred(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x - shift


def mix(
    x: Tensor,
    scale: Tensor,
    mask: Tensor | bool,
    *,
    clip: float | None,
    unsigned: bool = False,
    ste: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    r"""Replaces the frozen entries of `x` by hard binary ones and clips the soft ones.

    $$\hat x = \begin{cases} γ\,\operatorname{sign}(x) & \text{frozen, signed}\\ γ\,1[x \ge γ/2] & \text{frozen,
    unsigned}\\ \operatorname{clip}(x, -κγ, κγ) \text{ or } \operatorname{clip}(x, 0, κγ) & \text{soft}\end{cases}$$

    With a shift β, all of it is of \\(x - β\\), which is not kept for backward.

    Backward: an entry passes the gradient of its *soft* branch, `1[lower <= x <= upper]`. A frozen entry passes none,
    or the same as a soft one with `ste`. The scale gets its true derivative (the sign or the indicator where frozen,
    ±κ where clipped, 0 elsewhere) if it requires a gradient.

    Args:
        x (`Tensor`): Latent weight or input, any shape.
        scale (`Tensor`): α or γ, positive, broadcastable against `x`.
        mask (`Tensor` or `bool`): Boolean, `True` where frozen, broadcastable against `x`; a plain `True` or `False`
            for all entries saves the work of the other branch.
        clip (`float`, *optional*): κ, in units of the scale; `None` does not clip, and with an all-`False` mask
            returns `x` bit for bit.
        unsigned (`bool`, *optional*, defaults to `False`): Levels {0, γ} instead of {-γ, +γ}.
        ste (`bool`, *optional*, defaults to `False`): The straight-through estimator on frozen entries.
        shift (`Tensor`, *optional*): β, broadcastable against `x`.

    Example:

        >>> x, mask = torch.tensor([-3.0, -0.2, 0.5, 2.0]), torch.tensor([False, True, True, False])
        >>> mix(x, torch.tensor(1.0), mask, clip=1.0)
        tensor([-1., -1.,  1.,  1.])

    Source: arXiv 2601.22660; the straight-through estimator is BinaryConnect's (Courbariaux et al., 2015).
    """
    return _Mix.apply(x, scale, shift, mask, clip, unsigned, ste)
