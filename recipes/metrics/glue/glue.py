"""The official GLUE metrics as a local `evaluate` module: the same keys as the Hub's `glue`, and no network."""

import warnings
from collections.abc import Callable, Sequence

import datasets
import evaluate
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Scores = dict[str, float]

_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  note={In the Proceedings of ICLR.},
  year={2019}
}
"""

_DESCRIPTION = "The metrics of the nine GLUE tasks (https://gluebenchmark.com), computed by scikit-learn and scipy."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[int]`, or `list[float]` for `stsb`):
        Predicted classes (similarity scores for `stsb`), one per row.
    references (`list[int]`, or `list[float]` for `stsb`):
        The true ones, in the same order.

Returns:
    `dict[str, float]`, each value in [-1, 1]:
        - `accuracy` (all but `cola` and `stsb`): share of equal rows.
        - `f1` (`mrpc`, `qqp`): `2·TP / (2·TP + FP + FN)` of class 1; 0 if class 1 is neither predicted nor true.
        - `matthews_correlation` (`cola`): `(TP·TN - FP·FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN))`; 0 if either side
          is constant, where the quotient is 0/0.
        - `pearson`, `spearmanr` (`stsb`): correlation of the values, of their ranks; 0 if either side is constant or
          has fewer than two rows (a constant answer explains nothing), nan if a prediction is nan (training diverged).

Examples:

    >>> metric = evaluate.load("recipes/metrics/glue", "mrpc")
    >>> metric.compute(predictions=[1, 1, 0, 0], references=[1, 0, 0, 0])
    {'accuracy': 0.75, 'f1': 0.6666666666666666}
"""


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    return {"accuracy": float(accuracy_score(references, predictions))}


def accuracy_and_f1(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    f1 = f1_score(references, predictions, average="binary", zero_division=0.0)
    return {**accuracy(predictions, references), "f1": float(f1)}


def matthews(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def correlations(predictions: Sequence[float], references: Sequence[float]) -> Scores:
    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return {"pearson": 0.0, "spearmanr": 0.0}
    with warnings.catch_warnings():
        # A collapsed model gives near-constant predictions: the value says so, a warning per call adds nothing.
        warnings.simplefilter("ignore", (ConstantInputWarning, NearConstantInputWarning))
        pearson, spearman = pearsonr(predictions, references), spearmanr(predictions, references)
    return {"pearson": float(pearson.statistic), "spearmanr": float(spearman.statistic)}


METRICS: dict[str, Callable[..., Scores]] = {
    "cola": matthews,
    "sst2": accuracy,
    "mrpc": accuracy_and_f1,
    "stsb": correlations,
    "qqp": accuracy_and_f1,
    "mnli": accuracy,
    "mnli_matched": accuracy,
    "mnli_mismatched": accuracy,
    "qnli": accuracy,
    "rte": accuracy,
    "wnli": accuracy,
}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Glue(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise ValueError(
                f"config_name: received {self.config_name!r}, which is no GLUE task; allowed: {', '.join(METRICS)}. "
                'Pass one of them as the second argument: evaluate.load(path, "sst2").'
            )
        kind = "float32" if self.config_name == "stsb" else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> Scores:
        if len(references) == 0:
            raise ValueError("references: received no rows; nothing to score. Check the split and its sample limit.")
        if self.config_name != "stsb" and min(references) < 0:
            raise ValueError(
                f"references: received the label {min(references)} for {self.config_name}; labels are classes from 0. "
                "GLUE hides the test labels as -1: score the validation split, or submit a prediction file."
            )
        return METRICS[self.config_name](predictions, references)
