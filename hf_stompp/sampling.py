"""What activation scales are calibrated on: examples from all over a training set."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

CALIBRATION_EXAMPLES = 64
"""At most; of a smaller global batch, as many as it has: so that it does not depend on how many processes share it."""


def calibration_batches(
    trainer: Any, model: nn.Module, dataloader: Any, args: TrainingArguments
) -> list[dict[str, Any]]:
    """Examples from all over the training set, which may be sorted, as keyword arguments of the model's `forward`: the
    same on every rank, without touching the sampler. One batch; of a trainer of sentence-transformers one for each
    column, the first column's at the end, so that it is what a layer saw last. None of a stream, whose examples would
    be lost to training, or where the collator gives what `forward` does not take."""
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return []
    # A dataloader that Accelerate has prepared has its batch size in the batch sampler only.
    size = getattr(dataloader.batch_sampler, "batch_size", None) or dataloader.batch_size or 1
    size = min(size * args.world_size * args.gradient_accumulation_steps, CALIBRATION_EXAMPLES)
    rows = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // size))[:size]]
    # Of several data sets in one, as sentence-transformers has them, those of the first: one batch has one kind.
    rows = [row for row in rows if not isinstance(row, Mapping) or row.keys() == rows[0].keys()]
    with torch.random.fork_rng():  # a collator may draw, as the one of masked language modelling does
        torch.manual_seed(args.seed)  # the same in every process, and in a resumed run
        batch = dataloader.collate_fn(rows)
    if not isinstance(batch, Mapping):
        return []
    apart = getattr(trainer, "not_for_the_model", ())
    batch = {
        key: value.to(args.device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in apart
    }
    columns = trainer.collect_features(batch)[0] if hasattr(trainer, "collect_features") else None
    batches = [batch] if columns is None else [{"input": column} for column in reversed(columns)]
    return batches if all(_takes(model, batch) for batch in batches) else []


def _takes(model: nn.Module, batch: dict[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return "input" not in batch or isinstance(batch["input"], Mapping)  # texts, of a CrossEncoder
