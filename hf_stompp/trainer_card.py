"""`TrainerCard`: what `Trainer.push_to_hub` publishes as the README of a binarized model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_stompp.card import UNNAMED, render
from hf_stompp.checkpoint import check_kind
from hf_stompp.config import BinarizationConfig
from hf_stompp.results import OWN, Scored, result_row, training_facts

logger = logging.get_logger(__name__)


class TrainerCard:
    """Stands in for `create_model_card` of a Trainer: our card replaces the stock one as soon as that is written.

    Of the stock card it keeps the base model, license, language, tags and data, which the Trainer or the caller knew.
    Scores are those that were logged; what the model is, it says itself. If it cannot be written the stock card stays,
    for a trained model is worth more than its card.

    Args:
        trainer (`Trainer`): Of a binarized model.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._stock = trainer.create_model_card
        self._path = Path(trainer.args.output_dir) / "README.md"
        self._written: str | None = None

    @classmethod
    def install(cls, trainer: Any) -> "TrainerCard":
        """Replaces the method of this one Trainer; a second call finds that of the first."""
        if not isinstance(trainer.create_model_card, cls):
            trainer.create_model_card = cls(trainer)
        return trainer.create_model_card

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._stock(*args, **kwargs)
        if not self._trainer.is_world_process_zero():
            return
        try:
            self._card().save(self._path)
            self._written = self._path.read_text(encoding="utf-8")
        except Exception as error:
            logger.warning(f"{self._path} stays the Trainer's own, hf_stompp's could not be written: {error}")

    def write_early(self) -> None:
        """For a push in the middle of training, where the Trainer writes no card and leaves alone what is there."""
        if not self._path.is_file() or self._path.read_text(encoding="utf-8") == self._written:
            self()

    def _card(self) -> ModelCard:
        trainer, model = self._trainer, self._trainer.model
        if hasattr(model, "peft_config"):
            from hf_stompp.peft.card import PeftModel, adapter_card  # who has adapters has PEFT

            if not isinstance(model, PeftModel):
                raise TypeError(f"a {type(model).__name__} with an adapter inside is no PeftModel")
            return adapter_card(model, model.active_adapters[0], repo_id=trainer.hub_model_id or UNNAMED)
        config: Any = getattr(model.config, "quantization_config", None)
        check_kind(config, f"The Trainer's {type(model).__name__}", latent=True)
        stock: Any = ModelCard.load(self._path).data
        # In the middle of training the weights are in the checkpoint only.
        checkpoint = self._path.with_name(f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        folder = checkpoint if trainer.is_in_train and checkpoint.is_dir() else self._path.parent
        # A packed model is not what the logs are of, and without a step there was no training.
        latent = config.mode == "train" and trainer.state.global_step > 0
        card = render(
            model,
            folder,
            {OWN: _run(trainer, config, folder)} if latent else {},
            _scored(stock),
            repo_id=trainer.hub_model_id or UNNAMED,
            base_model=_base_model(stock.base_model),
            license=stock.license,
        )
        tags = dict.fromkeys([*card.data["tags"], *(stock.tags or [])])
        for key, value in {"language": stock.language, "datasets": stock.datasets, "tags": list(tags)}.items():
            card.data[key] = value
        return card


def _run(trainer: Any, config: BinarizationConfig, folder: Path) -> dict[str, Any]:
    """The run so far, as the recipes' `results.json` has it; its row is of the `step` of the last evaluation."""
    state: TrainerState = trainer.state
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint and not trainer.is_in_train
    steps = state.best_global_step if best else state.global_step
    scores = _evaluations(state.log_history)
    step = steps if steps in scores else max(scores, default=steps)
    # The Trainer puts their names before the metrics.
    parts = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    row = {**result_row("latent", scores.get(step, {}), folder, parts), "step": step}
    return {"recipe": {}, **training_facts(trainer.args, config), "steps": steps, "rows": [row], "parts": parts}


def _evaluations(log_history: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Step → what evaluations logged there; each of several evaluation sets has a log of its own."""
    found: dict[int, dict[str, float]] = {}
    for log in log_history:
        metrics = {k: v for k, v in log.items() if k.startswith("eval_") and isinstance(v, (int, float))}
        if metrics:
            found.setdefault(log["step"], {}).update(metrics)
    return found


def _scored(stock: Any) -> Scored:
    """The evaluation data, as far as the Trainer's card names it."""
    names = [stock.datasets] if isinstance(stock.datasets, str) else stock.datasets or []
    result = next(iter(stock.eval_results or []), None)
    if result is None:
        return Scored(next(iter(names), None), split=None)
    arguments = result.dataset_args if isinstance(result.dataset_args, str) else None
    return Scored(result.dataset_type, result.dataset_config or arguments, result.dataset_split)


def _base_model(name: Any) -> str | None:
    """`name` if it can be a Hub id; the Trainer takes any name for one, also the path of a folder that has gone."""
    return name if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) else None
