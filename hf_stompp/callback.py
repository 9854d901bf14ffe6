"""`StomppCallback`: drives the masks of a binarized model from the Trainer's step, and logs what they do."""

import copy
import dataclasses
import importlib.util
import json
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_stompp.calibration import Calibration
from hf_stompp.callers import calling_handler, calling_trainer
from hf_stompp.config import BinarizationConfig
from hf_stompp.finite import FiniteGuard
from hf_stompp.layers import LatentInput, LatentLayer, LatentWeight
from hf_stompp.patching import binary_layers, binary_weights, frozen_fraction, keep_masks_home
from hf_stompp.preflight import check_schedule, check_sharding
from hf_stompp.probes import Probes
from hf_stompp.report import TrainingLog, plot
from hf_stompp.sampling import calibration_batches
from hf_stompp.sharding import agree, is_sharded, several_processes
from hf_stompp.trainer_card import TrainerCard

logger = logging.get_logger(__name__)


class StomppCallback(TrainerCallback, ExportableState):
    """Schedules the binarization of a model that [`binarize`] or `from_pretrained` has patched.

    `Trainer(model, args, callbacks=[StomppCallback()], ...)` is all there is to do. Before each optimizer step the
    masks are set to the schedule's fractions for that step; after it, frozen weights of an STE-free run get their
    values back. At the start of training the activation scales are calibrated on a batch of examples from all over the
    training set, and those of a unit again when its window begins.

    It holds no state that matters: the schedule is a function of `global_step` and `max_steps`, so a resumed run goes
    on as it was. The config is written into `trainer_state.json`, so that a run is not resumed with another one. A
    loss that is NaN or infinite ends the run, and no checkpoint is made of weights that are.

    To every training log it adds `frozen_fraction` (of all binarizable weights), `front` (how many units are fully
    frozen), `front_fraction` (the fraction of the unit that is next to finish) and `flip_ratio` (the share of weight
    signs that changed since the last log; under FSDP, in the shards of the first process). What [`~report.plot`] draws
    besides, of each unit, is in the log history alone: `unit_flips`, and `unit_gradients`, which compiled and sharded
    models do not have. TensorBoard gets the picture at the end, if matplotlib is there.

    The model card of `Trainer.push_to_hub` becomes that of [`model_card`], with the logged scores and settings.

    Raises:
        ValueError: At the start of training, if the model is not binarized, is packed, was made with another config,
            or if the schedule cannot finish in `max_steps`; or if a run is resumed with another config, or another
            `max_steps` that changes what is frozen by now.
        FloatingPointError: In training, if the loss, or a weight that is to be saved, is NaN or infinite.

    Example:

        >>> from transformers import Trainer
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[StomppCallback()])  # doctest: +SKIP

    Source: arXiv 2601.22660.
    """

    def __init__(self) -> None:
        self._layers: dict[str, LatentLayer] = {}
        self._weights: dict[str, LatentWeight] = {}
        self._fractions: list[float] = []
        self._calibration: Calibration | None = None
        self._examples: list[dict[str, Any]] = []
        self._probes: Probes | None = None
        self._processes = 1

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of it in a checkpoint: the config, to compare a resumed run's with, and the names of
        the layers of each unit, for pictures."""
        if not self._layers:
            return {"args": {}, "attributes": {}}
        units: list[list[str]] = [[] for _ in range(self._units)]
        for name, layer in self._layers.items():
            units[layer.unit].append(name)
        attributes = {"trained_with": _comparable(self._config), "processes": self._processes, "units": units}
        return {"args": {}, "attributes": attributes}

    @property
    def _config(self) -> BinarizationConfig:
        return next(iter(self._layers.values())).config

    @property
    def _units(self) -> int:
        return 1 + max(layer.unit for layer in self._layers.values())

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        keep_masks_home(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self._layers, self._weights = binary_layers(model), binary_weights(model)
        self._processes = args.world_size
        check_schedule(model, state.max_steps)
        check_sharding(self._weights)
        self._check_deepspeed(args)
        self._check_start(state, frozen_fraction(model))
        _go_first(self)
        trainer = calling_trainer()
        if trainer is not None:
            FiniteGuard.install(trainer, self._position)
        self._set_masks(state.global_step + 1, state.max_steps)
        if self._config.activations:
            self._calibration = None
            self._examples = calibration_batches(trainer, model, kwargs["train_dataloader"], args)
            if not self._all_calibrated():
                if not self._examples:
                    raise ValueError(
                        "There is nothing to calibrate the activation scales on: the training set is a stream, whose "
                        "examples would be lost to training, or its collator gives no keyword arguments of the "
                        "model's forward. Call hf_stompp.calibrate(model, batch) on a batch of your own before "
                        "training, or set activations=False."
                    )
                self._calibrate(model)
            elif args.deepspeed_plugin is not None:
                self._examples = []  # its optimizer would undo it
            elif not self._examples:
                logger.warning(
                    "The training set is a stream, or its collator gives no keyword arguments of the model's forward: "
                    "units are not calibrated again when their windows begin, and keep the scales they have been "
                    "given."
                )
        # Hooks would break a compiled graph, and FSDP has its own around the layers.
        hooked = not (args.torch_compile or any(is_sharded(layer.weight) for layer in self._weights.values()))
        if self._probes is not None:
            self._probes.stop()  # of a training that ended in the middle of a step
        self._probes = Probes(self._layers, gradients=hooked)
        state.stateful_callbacks[type(self).__name__] = self.state()  # or it would be in checkpoints alone

    def _all_calibrated(self) -> bool:
        return all(layer.calibrated for layer in self._layers.values() if isinstance(layer, LatentInput))

    def _check_deepspeed(self, args: TrainingArguments) -> None:
        """DeepSpeed's optimizer steps on copies of its own: what is written to parameters besides is lost."""
        if args.deepspeed_plugin is None:
            return
        if self._config.weights and self._config.surrogate == "none":
            raise ValueError(
                'surrogate: received "none" with DeepSpeed, whose optimizer moves frozen weights, and does not take '
                'their values back; allowed: surrogate="ste". Or train with DDP or FSDP.'
            )
        if self._config.activations and not self._all_calibrated():
            raise ValueError(
                "With DeepSpeed, activation scales cannot be calibrated once training has begun. Call "
                "hf_stompp.calibrate(model, batch) on a batch of your data before you make the Trainer."
            )

    def _check_start(self, state: TrainerState, frozen: float) -> None:
        """A resumed run must find the fractions its schedule left; a new one says so if it thaws a frozen model."""
        if state.global_step >= state.max_steps:
            raise ValueError(
                f"There is nothing left to train: the checkpoint is of step {state.global_step}, and max_steps is "
                f"{state.max_steps}. Load the model from the checkpoint, or train on with a larger max_steps."
            )
        if state.global_step > 0:
            self._check_config(state)
            expected = self._unit_fractions(state.global_step, state.max_steps)
            for name, layer in self._layers.items():
                # As it was saved, in the dtype of the buffer.
                rounded = torch.tensor(expected[layer.unit], dtype=layer.frozen_fraction.dtype, device="cpu").item()
                if abs(layer.fraction - rounded) > 1e-6:
                    raise ValueError(
                        f"{name} was saved with a frozen fraction of {layer.fraction:.4f}, but at step "
                        f"{state.global_step} of max_steps={state.max_steps} the schedule has "
                        f"{expected[layer.unit]:.4f}: max_steps or the schedule changed. Resume with the old ones, or "
                        "start a new run from the saved model."
                    )
        elif frozen > 0 and self._config.progression != "none":
            logger.warning(
                f"The model starts with a frozen fraction of {frozen:.3f}; its schedule freezes it again from 0. "
                'To go on with everything frozen, set progression="none".'
            )

    def _check_config(self, state: TrainerState) -> None:
        saved: Any = state.stateful_callbacks.get(type(self).__name__, {})
        saved = saved[-1] if isinstance(saved, list) else saved  # of several callbacks
        before, now = saved.get("attributes", {}).get("trained_with"), _comparable(self._config)
        if before is None:  # of a checkpoint that has been made without the callback, or by an older one
            return
        # A field of one of them alone is one of another version.
        changed = {key: (before[key], value) for key, value in now.items() if before.get(key, value) != value}
        if changed:
            what = "; ".join(f"{key} was {old!r}, and is {new!r}" for key, (old, new) in changed.items())
            raise ValueError(
                f"The checkpoint of step {state.global_step} was trained with another BinarizationConfig: {what}. "
                "Resume with the old one, or start a new run from the saved model."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # global_step is still that of the last step: the masks of step max_steps are the ones that are evaluated.
        before = self._unit_fractions(state.global_step, state.max_steps)
        self._set_masks(state.global_step + 1, state.max_steps)
        starting = [unit for unit, fraction in enumerate(self._fractions) if before[unit] == 0 < fraction]
        if starting and state.global_step > 0 and self._examples:
            self._calibrate(kwargs["model"], starting)
        if self._probes is not None and _is_logged(args, state, state.global_step + 1):
            self._probes.start()

    def _calibrate(self, model: nn.Module, units: list[int] | None = None) -> None:
        self._calibration = self._calibration or Calibration(model)
        for batch in self._examples:
            self._calibration(copy.deepcopy(batch), units)  # a SentenceTransformer writes into what it is given
        if several_processes():  # whose processors may round otherwise; DDP sends parameters once, before this
            for layer in self._layers.values():
                agree(layer, ("activation_scale", "activation_shift", "bias"))
            for module in model.modules():
                agree(module, ("running_mean",))

    def _set_masks(self, step: int, max_steps: int) -> None:
        self._fractions = self._unit_fractions(step, max_steps)
        for layer in self._layers.values():
            layer.set_frozen(self._fractions[layer.unit], step)

    def _unit_fractions(self, step: int, max_steps: int) -> list[float]:
        return list(self._config.unit_fractions(step, max_steps, self._units))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probes is not None:
            self._probes.stop()
        for layer in self._weights.values():
            layer.hold_frozen()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self._weights.values():
            layer.restore_frozen()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or self._probes is None:
            return
        flip_ratio, unit_flips = self._probes.flips()
        metrics = {
            "frozen_fraction": frozen_fraction(kwargs["model"]),
            **self._front(),
            "flip_ratio": flip_ratio,
        }
        logs.update(metrics)
        # The Trainer has written its copy already. Lists are for pictures: reporters take numbers.
        state.log_history[-1].update(metrics, unit_flips=unit_flips, unit_gradients=self._probes.gradient_norms())

    def _position(self) -> str:
        """How far the binarization is, for messages."""
        unfinished = [unit for unit, fraction in enumerate(self._fractions) if fraction < 1]
        if not unfinished:
            return "with all units frozen"
        front = max(unfinished, key=lambda unit: self._fractions[unit])
        names = [name for name, layer in self._layers.items() if layer.unit == front]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"with unit {front} ({names[0]}{more}) at the front, frozen by {self._fractions[front]:.2f}"

    def _front(self) -> dict[str, float]:
        """Position of the front and frozen fraction there."""
        unfinished = [fraction for fraction in self._fractions if fraction < 1]
        return {
            "front": len(self._fractions) - len(unfinished),
            "front_fraction": max(unfinished, default=1.0),
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not those of the schedule: another checkpoint may have been loaded.
        fraction = min((layer.fraction for layer in binary_layers(kwargs["model"]).values()), default=1.0)
        if fraction < 1 and not self._config.never_freezes:
            logger.warning(
                f"Training ended at step {state.global_step} of {state.max_steps} with a unit that is frozen by "
                f"{fraction:.3f}: the model is not binary and pack() will refuse it. Resume the run if it was stopped "
                "early; if load_best_model_at_end chose a checkpoint from before the end, take the last one."
            )
        _show_in_tensorboard(state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = calling_trainer()
        if trainer is None:
            logger.warning("StomppCallback found no Trainer that calls it: the model card will be the Trainer's own.")
            return
        card = TrainerCard.install(trainer)
        if trainer.is_in_train:
            card.write_early()


def _is_logged(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether the Trainer logs after this step, or may: it does not say so before the end of an epoch."""
    if args.logging_strategy == "steps":
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
    return args.logging_strategy == "epoch"


def _show_in_tensorboard(state: TrainerState) -> None:
    """The picture of the whole run as an image, if TensorBoard is reported to and matplotlib is there."""
    handler = calling_handler()
    writers = [getattr(callback, "tb_writer", None) for callback in (handler.callbacks if handler else ())]
    writer = next((each for each in writers if each is not None), None)
    if writer is not None and importlib.util.find_spec("matplotlib") is not None:
        try:
            figure = plot(TrainingLog.of(dataclasses.asdict(state)))
        except (ArithmeticError, TypeError, ValueError) as error:  # a picture must not cost a trained model
            logger.warning(f"TensorBoard gets no picture of this training: {error}")
            return
        writer.add_figure("stompp/dynamics", figure, global_step=state.global_step)


def _comparable(config: BinarizationConfig) -> dict[str, Any]:
    """The config as JSON gives it back, without what training does not depend on."""
    apart = ("modules", "folded", "unknown", "format_version", "mode", "embedding_bits")
    content: dict[str, Any] = json.loads(json.dumps({k: v for k, v in dict(config).items() if k not in apart}))
    return content


def _go_first(callback: StomppCallback) -> None:
    """Moves the callback to the front of the handler that is calling it.

    Reporters such as TensorBoard come before user callbacks and get the same dict of logs, so metrics added after them
    are never seen. Where no handler is found, the log history and the progress bar have the metrics still.
    """
    handler = calling_handler()
    if handler is None:
        logger.warning("StomppCallback found no Trainer that calls it: reporters will not see its metrics.")
        return
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)
