"""What latent layers have in common: full-precision weights under masks that say which entries are binary already."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_stompp.config import BinarizationConfig
from hf_stompp.masks import draw_mask, refresh_position
from hf_stompp.sharding import local, shard_as

SAMPLED_SIGNS = 1 << 16
"""The flip ratio is measured on at most this many weights of a layer, evenly spaced: exact up to 64 Ki weights."""


class LatentLayer(nn.Module):
    """A module on its way from full precision to 1 bit: its masks, and its place in the schedule.

    Attributes:
        frozen_fraction, mask_step (`Tensor`): From which the masks are drawn again on loading.
        config (`BinarizationConfig`): The rules.
        key (`str`): What the masks are keyed by: the name of the layer inside the base model.
        unit (`int`): Place of the layer's unit in execution order, from 0.
        fraction (`float`): The frozen fraction.
    """

    MASKS: ClassVar[tuple[str, ...]]
    """Each has a buffer `…_mask`, which no checkpoint holds."""

    config: BinarizationConfig
    key: str
    unit: int
    fraction: float
    frozen_fraction: Tensor
    mask_step: Tensor

    def _schedule(self, config: BinarizationConfig, key: str, unit: int, device: torch.device) -> None:
        """Takes its place in the schedule, all soft."""
        self.config, self.key, self.unit = config, key, unit
        self.fraction, self._position = 0.0, 0.0
        # A fixed dtype, also where the default is another.
        self.register_buffer("frozen_fraction", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("mask_step", torch.zeros((), dtype=torch.int64, device=device))

    def _add_mask(self, kind: str, shape: tuple[int, ...]) -> None:
        mask = torch.zeros(shape, dtype=torch.bool, device=self.frozen_fraction.device)
        self.register_buffer(f"{kind}_mask", mask, persistent=False)

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
        """Draws the masks from `frozen_fraction` and `mask_step`, after loading a checkpoint."""
        self._draw_masks(self.frozen_fraction.item(), int(self.mask_step.item()))

    def _draw_masks(self, fraction: float, step: int) -> None:
        config = self.config
        # Kept as Python numbers besides, so that no step has to wait for a device to read them.
        self.fraction = fraction
        self._position = refresh_position(step, config.refresh, config.refresh_interval)
        for kind in self.MASKS:
            mask = getattr(self, f"{kind}_mask")
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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.load_masks()


class LatentWeight(LatentLayer):
    """A [`LatentLayer`] of a weight: what keeps the frozen entries of it frozen.

    Attributes:
        weight (`Parameter`): Latent weight.
        weight_mask (`Tensor`): Boolean, the shape of the weight, one byte each; `True` where frozen.
    """

    MASKS: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Tensor
    weight_mask: Tensor

    def _adopt(self, weight: Tensor, config: BinarizationConfig, key: str, unit: int) -> None:
        """Takes over a full-precision weight, all soft."""
        if weight.dtype in (torch.float16, torch.bfloat16):
            # A latent step is smaller than half precision resolves.
            weight = nn.Parameter(weight.detach().float(), weight.requires_grad)
        self.weight = weight
        self._schedule(config, key, unit, weight.device)
        self._add_mask("weight", weight.shape)

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
            self._held = local(self.weight).clone()

    @torch.no_grad()
    def restore_frozen(self) -> None:
        """After the optimizer's step: gives the frozen weights of a partly frozen layer their value back."""
        held = self.__dict__.pop("_held", None)
        if held is not None:
            weight = local(self.weight)
            torch.where(shard_as(self.weight_mask, self.weight), held, weight, out=weight)

    def sampled_signs(self) -> Tensor:
        """The signs of at most `SAMPLED_SIGNS` evenly spaced weights of this process, to measure the flip ratio."""
        weight = local(self.weight)
        stride = max(1, -(-weight.numel() // SAMPLED_SIGNS))
        return weight.flatten()[::stride] >= 0
