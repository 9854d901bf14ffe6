"""The mathematics of one binarizable tensor: scale, clip, and the mixed forward with its two backward rules.

`sign(0) = +1` everywhere, so that one bit is enough: a sign is `x >= 0`, never `torch.sign`, whose third value has
no bit.

Pure functions of tensors: no modules, no configuration, no randomness. METHOD: Smith and Islam, arXiv 2601.22660 and
arXiv 2606.27759.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def weight_scale(weight: Tensor, granularity: str) -> Tensor:
    r"""The scale α of a weight `[out, ...]`, broadcastable against it, in float32 and without gradient.

    `"channel"`: \\(α_n = \operatorname{mean}_k |w_{nk}|\\), the least-squares scale of `sign(w)` for each output
    channel (Rastegari et al., XNOR-Net, 2016); `"tensor"`: one mean for all entries; `"none"`: 1.
    """
    magnitude = weight.detach().abs()
    shape = (-1,) + (1,) * (weight.dim() - 1)
    if granularity == "channel":
        return magnitude.flatten(1).mean(dim=1, dtype=torch.float32).view(shape)
    if granularity == "tensor":
        return magnitude.mean(dtype=torch.float32).expand(weight.shape[0]).view(shape)
    return torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device).view(shape)


def activation_threshold(scale: Tensor, shift: Tensor | None, unsigned: bool) -> Tensor:
    """The value from which on an input is the upper level: `γ/2` for levels {0, γ}, `β` (or 0) for {-γ, +γ}."""
    if unsigned:
        return scale / 2
    return torch.zeros_like(scale) if shift is None else shift


def _hard(x: Tensor, scale: Tensor, unsigned: bool) -> Tensor:
    """The binary value of every entry. In-place arithmetic on 0/1 floats: `torch.where` on signs, which are as good as
    random, is ten times slower on a CPU (it branches)."""
    if unsigned:
        return (x - scale / 2).ge_(0).mul_(scale)
    return x.clone().ge_(0).mul_(2 * scale).sub_(scale)


def _soft(x: Tensor, scale: Tensor, clip: float | None, unsigned: bool) -> Tensor:
    """The clipped value of every entry."""
    if clip is None:
        return x
    upper = clip * scale
    return torch.minimum(torch.maximum(x, torch.zeros_like(upper) if unsigned else -upper), upper)


def _inside(x: Tensor, scale: Tensor, clip: float, unsigned: bool) -> Tensor:
    """1 where the soft value is not clipped, else 0, in the dtype of `x`."""
    if unsigned:
        return (clip * scale - x).mul_(x).ge_(0)
    return x.abs().le_(clip * scale)


class _Mix(torch.autograd.Function):
    """The frozen entries hard, the others soft; the gradient of `soft`, cut at frozen entries unless `ste`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, mask: Tensor | bool, clip: float | None, unsigned: bool, ste: bool
    ) -> Tensor:
        if mask is True:
            y = _hard(x, scale, unsigned)
        elif mask is False:
            y = _soft(x, scale, clip, unsigned).view_as(x)
        else:
            # lerp with weights 0 and 1 returns one end or the other exactly.
            frozen = mask.view(torch.uint8).to(x.dtype)
            y = torch.lerp(_soft(x, scale, clip, unsigned), _hard(x, scale, unsigned), frozen)
        ctx.save_for_backward(
            x, scale, y if ctx.needs_input_grad[1] else None, mask if isinstance(mask, Tensor) else None
        )
        ctx.all_frozen, ctx.clip, ctx.unsigned, ctx.ste = mask is True, clip, unsigned, ste
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, scale, y, mask = ctx.saved_tensors
        grad_inside = grad if ctx.clip is None else _inside(x, scale, ctx.clip, ctx.unsigned).mul_(grad)
        if mask is not None:
            grad_soft = grad_inside * (1 - mask.view(torch.uint8).to(grad.dtype))
        else:
            grad_soft = torch.zeros_like(grad) if ctx.all_frozen else grad_inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # y is γ times a constant where frozen or clipped, and does not depend on γ elsewhere.
            grad_scale = ((grad - grad_soft) * y).sum_to_size(scale.shape) / scale
        return grad_inside if ctx.ste else grad_soft, grad_scale, None, None, None, None


def mix(
    x: Tensor, scale: Tensor, mask: Tensor | bool, *, clip: float | None, unsigned: bool = False, ste: bool = False
) -> Tensor:
    r"""Replaces the frozen entries of `x` by hard binary ones and clips the soft ones.

    $$\hat x = \begin{cases} γ\,\operatorname{sign}(x) & \text{frozen, signed}\\ γ\,1[x \ge γ/2] & \text{frozen,
    unsigned}\\ \operatorname{clip}(x, -κγ, κγ) \text{ or } \operatorname{clip}(x, 0, κγ) & \text{soft}\end{cases}$$

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

    Example:

        >>> x, mask = torch.tensor([-3.0, -0.2, 0.5, 2.0]), torch.tensor([False, True, True, False])
        >>> mix(x, torch.tensor(1.0), mask, clip=1.0)
        tensor([-1., -1.,  1.,  1.])

    Source: arXiv 2601.22660; the straight-through estimator is BinaryConnect's (Courbariaux et al., 2015).
    """
    return _Mix.apply(x, scale, mask, clip, unsigned, ste)
