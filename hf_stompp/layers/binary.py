"""The latent layer: full-precision weights under a mask that says which entries are already binary."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hf_stompp.config import BinarizationConfig
from hf_stompp.functional import mix, weight_scale
from hf_stompp.masks import draw_mask, refresh_position

SAMPLED_SIGNS = 1 << 16
"""The flip ratio is measured on at most this many weights of a layer, evenly spaced: exact up to 64 Ki weights."""


class BinaryLinear(nn.Linear):
    r"""A linear layer that is on its way from full precision to 1 bit: \\(y = \hat x \hat w^\top + b\\).

    `ŵ` and `x̂` are the mixtures of frozen and soft entries of [`~hf_stompp.functional.mix`]. The layer is made from an
    `nn.Linear` by [`from_float`], shares its parameters, and has the same parameter names, so a full-precision
    checkpoint loads into it. `forward` is a pure function of parameters and masks: it draws nothing, counts nothing.

    Attributes:
        weight (`Parameter`): Latent weight `[out_features, in_features]`.
        activation_scale (`Parameter`, *optional*): γ, `[1]`; only with binary activations.
        activation_shift (`Parameter`, *optional*): β, `[in_features]`; only with a learned shift and signed levels.
        weight_mask (`Tensor`): Boolean, the shape of the weight, one byte each; `True` where frozen.
        activation_mask (`Tensor`): Boolean, `[in_features]`, shared by all tokens.
        frozen_fraction, mask_step (`Tensor`): From which the masks are drawn again on loading.
        calibrated (`Tensor`): Whether the activation scale and shift have been set from data.

    Source: arXiv 2601.22660.
    """

    config: BinarizationConfig
    key: str
    unit: int
    unsigned: bool
    fraction: float
    activation_scale: nn.Parameter | None
    activation_shift: nn.Parameter | None
    weight_mask: Tensor
    activation_mask: Tensor
    frozen_fraction: Tensor
    mask_step: Tensor
    calibrated: Tensor

    @classmethod
    def from_float(cls, linear: nn.Linear, config: BinarizationConfig, *, key: str, unit: int, unsigned: bool) -> Self:
        """Makes the layer around the parameters of `linear`, on its device, without drawing random numbers.

        Args:
            linear (`nn.Linear`): The layer to replace.
            config (`BinarizationConfig`): The rules.
            key (`str`): What the masks are keyed by: the name of the layer inside the base model.
            unit (`int`): Place of the layer's unit in execution order, from 0.
            unsigned (`bool`): Whether its inputs have the levels {0, γ}.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer._parameters.update(linear._parameters)
        if linear.weight.dtype in (torch.float16, torch.bfloat16):
            # A latent step is smaller than half precision resolves.
            layer.weight = nn.Parameter(linear.weight.detach().float(), linear.weight.requires_grad)
        layer.train(linear.training)
        layer.config, layer.key, layer.unit, layer.unsigned = config, key, unit, unsigned
        layer.fraction, layer._position = 0.0, 0.0
        device = linear.weight.device
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}  # also where the default is another
        scale = shift = None
        if config.activations:
            scale = nn.Parameter(torch.ones(1, **float32), requires_grad=config.learn_activation_scale)
            if config.learn_activation_shift and not unsigned:
                shift = nn.Parameter(torch.zeros(layer.in_features, **float32))
        layer.register_parameter("activation_scale", scale)
        layer.register_parameter("activation_shift", shift)
        layer.register_buffer("frozen_fraction", torch.zeros((), **float32))
        layer.register_buffer("mask_step", torch.zeros((), dtype=torch.int64, device=device))
        layer.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=device))
        for name, size in (("weight_mask", linear.weight.shape), ("activation_mask", (layer.in_features,))):
            layer.register_buffer(name, torch.zeros(size, dtype=torch.bool, device=device), persistent=False)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        weight = self.effective_weight()
        return nn.functional.linear(self.effective_input(input), weight.to(input.dtype), self.bias)

    def effective_weight(self) -> Tensor:
        """ŵ, in the dtype of the latent weight."""
        if not self.config.weights:
            return self.weight
        scale = weight_scale(self.weight, self.config.scale).to(self.weight.dtype)
        ste = self.config.surrogate == "ste"
        return mix(self.weight, scale, self._mask(self.weight_mask), clip=self.config.clip, ste=ste)

    def effective_input(self, input: Tensor) -> Tensor:
        """x̂, in the dtype of the input."""
        if self.activation_scale is None:
            return input
        # In the precision of the scale, as the packed layer compares: rounding must not decide on a bit.
        centred = input.to(self.activation_scale.dtype)
        if self.activation_shift is not None:
            # Not `-`: its backward negates the whole gradient before it sums it.
            centred = centred + (-self.activation_shift)
        ste = self.config.surrogate == "ste"
        scale, mask = self.positive_scale(), self._mask(self.activation_mask)
        mixed = mix(centred, scale, mask, clip=self.config.clip, unsigned=self.unsigned, ste=ste)
        return mixed.to(input.dtype)

    def positive_scale(self) -> Tensor:
        """γ, kept above zero whatever the optimizer did to it."""
        assert self.activation_scale is not None
        return self.activation_scale.abs().clamp_min(1e-6)

    def _mask(self, mask: Tensor) -> Tensor | bool:
        """The mask, or one bool for it, which is faster. A compiled graph must not branch on what will change."""
        if torch.compiler.is_compiling() or 0.0 < self.fraction < 1.0:
            return mask
        return self.fraction == 1.0

    def set_frozen(self, fraction: float, step: int) -> bool:
        """Draws the masks for `fraction` at `step`; does no work, and returns `False`, if they would be the same."""
        config = self.config
        # As it is saved, so that a loaded layer has the same masks.
        fraction = torch.tensor(fraction, dtype=self.frozen_fraction.dtype, device="cpu").item()
        position = refresh_position(step, config.refresh, config.refresh_interval)
        if fraction == self.fraction and (fraction in (0.0, 1.0) or position == self._position):
            return False
        self.frozen_fraction.fill_(fraction)
        self.mask_step.fill_(step)
        self._draw_masks(fraction, step)
        return True

    def load_masks(self) -> None:
        """Draws both masks from `frozen_fraction` and `mask_step`, after loading a checkpoint."""
        self._draw_masks(self.frozen_fraction.item(), int(self.mask_step.item()))

    def _draw_masks(self, fraction: float, step: int) -> None:
        config = self.config
        # Kept as Python numbers besides, so that no step has to wait for a device to read them.
        self.fraction = fraction
        self._position = refresh_position(step, config.refresh, config.refresh_interval)
        for kind, mask in (("weight", self.weight_mask), ("activation", self.activation_mask)):
            drawn = draw_mask(
                tuple(mask.shape),
                self.fraction,
                seed=config.mask_seed,
                name=f"{self.key}.{kind}",
                step=step,
                refresh=config.refresh,
                refresh_interval=config.refresh_interval,
            )
            mask.copy_(drawn)

    def hold_frozen(self) -> None:
        """Before the optimizer's step: what is needed for frozen weights to keep their value through it.

        A zero gradient is not enough, momentum and weight decay move a weight all the same. A fully frozen weight gets
        no gradient at all, which optimizers skip; of a partly frozen one, a copy is put aside until `restore_frozen`.
        """
        if not self.config.weights or self.config.surrogate == "ste":
            return
        if self.fraction == 1.0:
            self.weight.grad = None
        elif self.fraction > 0.0:
            self._held = self.weight.detach().clone()

    @torch.no_grad()
    def restore_frozen(self) -> None:
        """After the optimizer's step: gives the frozen weights of a partly frozen layer their value back."""
        held = self.__dict__.pop("_held", None)
        if held is not None:
            torch.where(self.weight_mask, held, self.weight, out=self.weight.data)

    def sampled_signs(self) -> Tensor:
        """The signs of at most `SAMPLED_SIGNS` evenly spaced weights, to measure the flip ratio."""
        stride = -(-self.weight.numel() // SAMPLED_SIGNS)
        return self.weight.detach().flatten()[::stride] >= 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.load_masks()

    def extra_repr(self) -> str:
        levels = "32" if self.activation_scale is None else "1 unsigned" if self.unsigned else "1 signed"
        return f"{super().extra_repr()}, input_bits={levels}, unit={self.unit}, frozen={self.fraction:.3f}"
