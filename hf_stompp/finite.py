"""`FiniteGuard`: a run whose loss or weights are no numbers any more ends, with its checkpoints as they were."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_stompp.resuming import last_checkpoint


class FiniteGuard:
    """Stands in for `compute_loss` and `save_model` of one Trainer.

    The Trainer leaves losses that are NaN out of its logs, and goes on: one bad step makes all weights NaN, and a
    checkpoint of them takes the place of a good one.

    Args:
        trainer (`Trainer`): It.
        where: Tells how far the binarization is, for the message.
    """

    def __init__(self, trainer: Any, where: Callable[[], str]) -> None:
        self._trainer, self._where = trainer, where
        self._compute_loss, self._save_model = trainer.compute_loss, trainer.save_model

    @classmethod
    def install(cls, trainer: Any, where: Callable[[], str]) -> None:
        """Replaces the methods of this one Trainer, once."""
        if isinstance(getattr(trainer.compute_loss, "__self__", None), cls):
            trainer.compute_loss.__self__._where = where
            return
        guard = cls(trainer, where)
        trainer.compute_loss, trainer.save_model = guard.compute_loss, guard.save_model

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the Trainer.

        Raises:
            FloatingPointError: It is NaN or infinite, in training.
        """
        result = self._compute_loss(model, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        # The Trainer waits for each loss itself, to leave NaN out of its logs.
        if model.training and not torch.isfinite(loss.detach()).all():
            raise FloatingPointError(f"The loss is {loss.detach().mean().item()} {self._position(1)}")
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer saves.

        Raises:
            FloatingPointError: A weight is NaN or infinite, in training; nothing is written.
        """
        if self._trainer.is_in_train:
            for name, parameter in self._trainer.model.named_parameters():
                if not _all_finite(parameter):
                    raise FloatingPointError(f"{name} is no longer finite {self._position(0)}")
        return self._save_model(*args, **kwargs)

    def _position(self, ahead: int) -> str:
        state, args = self._trainer.state, self._trainer.args
        last = last_checkpoint(args.output_dir)
        return (
            f"at step {state.global_step + ahead} of {state.max_steps}, {self._where()}. "
            + (f"The last good checkpoint is {last}. " if last else "There is no checkpoint yet. ")
            + "Lower the learning rate or max_grad_norm, or train in a wider dtype: in float16 a loss overflows early."
        )


def _all_finite(parameter: Tensor) -> bool:
    local = parameter.detach()
    return bool(torch.isfinite(local.to_local() if isinstance(local, DTensor) else local).all())
