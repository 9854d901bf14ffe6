"""Loading GLUE from folders of parquet files, and every way in which a folder can be wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from glue_tasks import TASKS, get_task, load_task

Write = Callable[..., Path]


def test_labels_and_widths_of_the_heads() -> None:
    assert {name: task.num_labels for name, task in TASKS.items()} == {
        "cola": 2,
        "sst2": 2,
        "mrpc": 2,
        "stsb": 1,
        "qqp": 2,
        "mnli": 3,
        "qnli": 2,
        "rte": 2,
        "wnli": 2,
    }
    assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]


@pytest.mark.parametrize("inner", ["sst2", "."], ids=["folder of tasks", "folder of the task"])
@pytest.mark.parametrize("suffix", ["", "-00000-of-00001"], ids=["plain", "as on the Hub"])
def test_folder_layouts(write_split: Write, inner: str, suffix: str) -> None:
    write_split(f"{inner}/train{suffix}.parquet", sentence=["a", "b", "c"], label=[0, 1, 0], idx=[0, 1, 2])
    folder = write_split(f"{inner}/validation{suffix}.parquet", sentence=["d"], label=[1], idx=[0])
    data = load_task("sst2", folder)
    assert {split: rows.to_dict() for split, rows in data.items()} == {
        "train": {"sentence": ["a", "b", "c"], "label": [0, 1, 0]},
        "validation": {"sentence": ["d"], "label": [1]},
    }


def test_shards_are_read_in_order(write_split: Write) -> None:
    write_split("train-00001-of-00002.parquet", sentence=["c"], label=[0])
    write_split("train-00000-of-00002.parquet", sentence=["a", "b"], label=[0, 1])
    folder = write_split("validation.parquet", sentence=["d"], label=[1])
    assert load_task("sst2", folder)["train"]["sentence"][:] == ["a", "b", "c"]


def test_sample_limits_keep_the_first_rows(sst2_folder: Path) -> None:
    data = load_task("sst2", sst2_folder, True, max_train_samples=3, max_eval_samples=99, max_predict_samples=1)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "validation": 4, "test": 1}
    with pytest.raises(ValueError, match=r"'train': received 0; allowed: 1 or more"):
        load_task("sst2", sst2_folder, max_train_samples=0)


def test_test_split_comes_without_its_hidden_labels(sst2_folder: Path) -> None:
    assert load_task("sst2", sst2_folder, with_test=True)["test"].column_names == ["sentence"]


def test_mnli_has_two_evaluation_splits(write_split: Write) -> None:
    for split in ("train", "validation_matched", "validation_mismatched"):
        folder = write_split(f"mnli/{split}.parquet", premise=["a"], hypothesis=["b"], label=[2])
    assert list(load_task("mnli", folder)) == ["train", "validation_matched", "validation_mismatched"]


def test_regression_labels_become_floats(write_split: Write) -> None:
    for split in ("train", "validation"):
        folder = write_split(f"{split}.parquet", sentence1=["a", "b"], sentence2=["c", "d"], label=[5, 0])
    assert load_task("stsb", folder)["train"].features["label"] == Value("float32")


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"received 'SST-2'; allowed: cola, .*wnli. Did you mean 'sst2'\?"):
        load_task("SST-2")
    with pytest.raises(ValueError, match=r"received None; allowed: .*wnli, synthetic. Pass one"):
        get_task(None, others=["synthetic"])


def test_missing_folder_and_split(tmp_path: Path, write_split: Write) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere', which is not a folder. Pass one with sst2/train"):
        load_task("sst2", tmp_path / "nowhere")
    folder = write_split("sst2/train.parquet", sentence=["a"], label=[0])
    with pytest.raises(FileNotFoundError, match=r"no split 'validation'; it holds train.parquet. Add"):
        load_task("sst2", folder)


def test_missing_column(sst2_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"of rte has no column 'sentence1', 'sentence2'; it has sentence, label"):
        load_task("rte", sst2_folder / "sst2")


@pytest.mark.parametrize("texts", [["a", None], [1, 2]], ids=["null", "number"])
def test_texts_that_are_none(write_split: Write, texts: list) -> None:
    folder = write_split("train.parquet", sentence=texts, label=[0, 1])
    with pytest.raises(ValueError, match=r"'sentence' of the split 'train' of sst2: received .*strings only"):
        load_task("sst2", folder)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, r"received 2; allowed: 0 \(negative\), 1 \(positive\)\. Check"),
        (-1, r"received -1; .* -1 marks the hidden labels of a test split"),
        ("positive", r"received 'positive'; allowed: 0 \(negative\)"),
        (0.5, r"received 0.5; allowed: 0 \(negative\)"),
        (None, r"received None; allowed: 0 \(negative\)"),
    ],
)
def test_label_that_does_not_fit_the_head(write_split: Write, label: object, message: str) -> None:
    folder = write_split("train.parquet", sentence=["a"], label=[label])
    with pytest.raises(ValueError, match=f"'label' of the split 'train' of sst2: {message}"):
        load_task("sst2", folder)


@pytest.mark.parametrize("label", [float("nan"), None])
def test_score_that_is_no_number(write_split: Write, label: object) -> None:
    folder = write_split("train.parquet", sentence1=["a", "b"], sentence2=["c", "d"], label=[1.0, label])
    with pytest.raises(ValueError, match=r"of stsb: received (nan|None); allowed: any finite number"):
        load_task("stsb", folder)


def test_class_names_of_another_task(tmp_path: Path) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    Dataset.from_dict({"sentence": ["a"], "label": [0]}, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"classes \['positive', 'negative'\]; sst2 has \['negative', 'positive'\]"):
        load_task("sst2", tmp_path)


def test_unreachable_hub_says_what_to_do() -> None:
    with pytest.raises(ConnectionError, match=r"nyu-mll/glue \(wnli, train\) is neither .* pass --dataset_dir"):
        load_task("wnli")


@pytest.mark.parametrize(("name", "rows"), [("cola", 1043), ("mrpc", 408), ("rte", 277), ("sst2", 872), ("wnli", 71)])
def test_the_real_files(shared_data: Path, name: str, rows: int) -> None:
    data = load_task(name, shared_data / "glue", with_test=True, max_train_samples=10)
    assert len(data["validation"]) == rows
    assert set(data["validation"].unique("label")) == set(range(TASKS[name].num_labels))
