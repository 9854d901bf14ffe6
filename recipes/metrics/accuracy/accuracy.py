"""Accuracy as a local `evaluate` module: the same key as the Hub's `accuracy`, and no network."""

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import accuracy_score

_DESCRIPTION = "The share of rows whose class was predicted, computed by scikit-learn."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[int]`):
        Predicted classes, one per row.
    references (`list[int]`):
        The true ones, in the same order.

Returns:
    `dict[str, float]`: `accuracy`, in [0, 1].

Examples:

    >>> metric = evaluate.load("recipes/metrics/accuracy")
    >>> metric.compute(predictions=[0, 1, 2, 3], references=[0, 1, 2, 0])
    {'accuracy': 0.75}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int64"))),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("references: received no rows; nothing to score. Check the split and its sample limit.")
        if min(references) < 0:
            raise ValueError(
                f"references: received the label {min(references)}; labels are classes from 0. -1 marks hidden "
                "labels: score another split."
            )
        return {"accuracy": float(accuracy_score(references, predictions))}
