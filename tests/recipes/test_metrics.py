"""The metric modules, GLUE's against formulae written here in numpy."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

import glue_tasks

METRICS = Path(glue_tasks.__file__).parent / "metrics"
MODULE = METRICS / "glue"
ACCURACY_ONLY = ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"]


def score(name: str, predictions: Any, references: Any) -> dict[str, float]:
    metric = evaluate.load(str(MODULE), name, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)


@pytest.fixture
def binary() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    return np.where(rng.random(200) < 0.7, truth, 1 - truth), truth


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


@pytest.mark.parametrize("name", ACCURACY_ONLY)
def test_accuracy_is_the_share_of_equal_rows(name: str) -> None:
    rng = np.random.default_rng(1)
    predictions, references = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    assert score(name, predictions, references) == {"accuracy": pytest.approx((predictions == references).mean())}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_is_that_of_class_one(name: str, binary: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, references = binary
    hits = (predictions & references).sum()
    f1 = 2 * hits / (predictions.sum() + references.sum())
    accuracy = (predictions == references).mean()
    assert score(name, *binary) == {"accuracy": pytest.approx(accuracy), "f1": pytest.approx(f1)}


def test_matthews_correlation_is_pearsons_of_the_indicators(binary: tuple[np.ndarray, np.ndarray]) -> None:
    assert score("cola", *binary) == {"matthews_correlation": pytest.approx(pearson(*binary))}


def test_correlations_with_ties() -> None:
    rng = np.random.default_rng(2)
    references = np.round(rng.uniform(0, 5, 60))
    predictions = np.round(references + rng.normal(0, 1, 60), 1).astype(np.float32)
    scores = score("stsb", predictions, references)
    assert scores["pearson"] == pytest.approx(pearson(predictions, references), abs=1e-5)
    assert scores["spearmanr"] == pytest.approx(pearson(ranks(predictions), ranks(references)), abs=1e-9)


def test_a_constant_answer_scores_zero() -> None:
    assert score("cola", [1, 1, 1], [1, 0, 1]) == {"matthews_correlation": 0.0}
    assert score("mrpc", [0, 0, 0], [1, 0, 1]) == {"accuracy": pytest.approx(1 / 3), "f1": 0.0}
    assert score("stsb", [2.5, 2.5, 2.5], [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert score("stsb", [2.5], [1.0]) == {"pearson": 0.0, "spearmanr": 0.0}


def test_nan_predictions_score_nan() -> None:
    scores = score("stsb", [1.0, float("nan"), 2.0], [1.0, 2.0, 3.0])
    assert np.isnan(scores["pearson"]) and np.isnan(scores["spearmanr"])


def test_every_task_has_a_metric_that_gives_its_primary_one() -> None:
    for name, task in glue_tasks.TASKS.items():
        assert task.metric in score(name, [0, 1, 1], [0, 1, 0])


def test_unknown_config_lists_the_allowed() -> None:
    with pytest.raises(ValueError, match=r"'sst-2', which is no GLUE task; allowed: cola, sst2, .*wnli"):
        score("sst-2", [0], [0])


def test_hidden_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the label -1 for rte.*score the validation split"):
        score("rte", [0, 1], [-1, -1])


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="received no rows"):
        score("sst2", [], [])


def test_plain_accuracy() -> None:
    metric = evaluate.load(str(METRICS / "accuracy"), keep_in_memory=True)
    assert metric.compute(predictions=[0, 1, 9, 3], references=[0, 1, 2, 0]) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="received no rows"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="the label -1; .* hidden labels: score another split"):
        metric.compute(predictions=[0], references=[-1])
