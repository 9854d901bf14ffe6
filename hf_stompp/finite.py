"""`FiniteGuard`: a run whose loss or weights are no numbers any more ends, with its checkpoints as they were."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_stompp.resuming import TRAINER_STATE, last_checkpoint
from hf_stompp.sharding import any_process, local


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
        # In all processes or in none, or the others would wait for this one's gradients.
        if model.training and any_process(~torch.isfinite(loss.detach()).all()):
            raise FloatingPointError(f"The loss is {loss.detach().mean().item()} {self._position(1)}")
        return result

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer saves.

        Raises:
            FloatingPointError: A parameter or buffer is NaN or infinite; nothing is written.
        """
        bad = next((name for name, tensor in self._tensors() if not torch.isfinite(local(tensor)).all()), None)
        training = self._trainer.is_in_train  # then all processes save
        flag = torch.tensor(bad is not None, device=self._trainer.args.device)
        if any_process(flag) if training else bad is not None:
            raise FloatingPointError(f"{bad or 'A shard of another process'} is no longer finite {self._position(0)}")
        if training and output_dir is not None and self._trainer.args.should_save:
            # Of an earlier run in the same folder: with it, what is written now would seem whole from the start.
            (Path(output_dir) / TRAINER_STATE).unlink(missing_ok=True)
        return self._save_model(output_dir, *args, **kwargs)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        model = self._trainer.model
        statistics = ((name, tensor) for name, tensor in model.named_buffers() if ".running_" in name)
        return itertools.chain(model.named_parameters(), statistics)  # other buffers may hold -inf by right

    def _position(self, ahead: int) -> str:
        state, args = self._trainer.state, self._trainer.args
        last = last_checkpoint(args.output_dir)
        return (
            f"at step {state.global_step + ahead} of {state.max_steps}, {self._where()}. "
            + (f"The last good checkpoint is {last}. " if last else "There is no checkpoint yet. ")
            + "Lower the learning rate or max_grad_norm, or train in a wider dtype: in float16 a loss overflows "
            "early; and start anew, for a resumed run keeps its learning rate. The mean over a batch without labels "
            "is NaN too."
        )
