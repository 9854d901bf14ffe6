"""The scores on a card are reproduced from the card, the data and the files: those of a recipe's run, end to end."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import run_glue
import synthetic
from hf_stompp import verify
from hf_stompp.verification import Check

METRICS = str(Path(run_glue.__file__).parent / "metrics" / "glue")
FLAGS = (
    "--do_train --max_steps 4 --per_device_train_batch_size 4 --learning_rate 1e-3 --save_strategy no --disable_tqdm "
    "True --dataloader_pin_memory False --binarize --progression global --progression_end 1"
).split()


@pytest.fixture
def packed(tmp_path: Path, tiny_bert: str, sst2_folder: Path) -> Path:
    """What the recipe makes of SST-2 in four sentences."""
    given = ["--task_name", "sst2", "--dataset_dir", str(sst2_folder), "--model_name_or_path", tiny_bert]
    run_glue.main([*given, "--output_dir", str(tmp_path / "out"), *FLAGS])
    return tmp_path / "out" / "packed"


def score(folder: Path, **options: Any) -> Check:
    return verify(folder, **options).checks[-1]


def test_the_scores_of_a_card(
    packed: Path, sst2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = verify(packed, dataset_dir=sst2_folder, metric=METRICS)
    assert [check.status for check in done.checks] == 7 * ["passed"], done
    value = json.loads((packed.parent / "results.json").read_text())["rows"][-1]["accuracy"]
    assert done.checks[-1].name == "accuracy, validation"
    assert done.checks[-1].message == f"{value:.4f} on nyu-mll/glue (sst2); the card says {value:.4f}"

    text = (packed / "README.md").read_text()
    card = re.sub(r"(?<=\n      value: )[\d.]+", f"{value + 0.01}", text)
    assert card != text
    (packed / "README.md").write_text(card)
    assert score(packed, dataset_dir=sst2_folder, metric=METRICS).status == "failed"
    assert score(packed, dataset_dir=sst2_folder, metric=METRICS, tolerance=0.011).status == "passed"
    assert score(packed, scores=False).status == "skipped"
    (packed / "README.md").write_text(re.sub(r"(?<=\n      value: )[\d.]+", "high", text))
    assert score(packed, dataset_dir=sst2_folder, metric=METRICS).status == "failed"

    # What it takes is named where it is missing.
    (packed / "README.md").write_text(text)
    offline = score(packed, metric=METRICS)
    assert offline.status == "failed" and "neither in the local cache nor reachable on the Hub" in offline.message
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no split 'validation'; it holds no parquet file at all"):
        verify(packed, dataset_dir=tmp_path / "empty", metric=METRICS)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "evaluate" else find_spec(name))
    with pytest.raises(ImportError, match=r"the package 'evaluate': pip install 'hf_stompp\[recipes\]', or .*scores"):
        verify(packed, dataset_dir=sst2_folder, metric=METRICS)
    (packed / "README.md").write_text(text.replace("        columns:\n        - sentence\n", ""))
    assert score(packed).message == "the card does not say which columns the model reads"


def test_the_demo(tmp_path: Path, write_split: Callable[..., Path]) -> None:
    sizes = "--max_train_samples 32 --max_eval_samples 8".split()
    run_glue.main(["--task_name", "synthetic", *FLAGS, *sizes, "--output_dir", str(tmp_path)])
    packed = tmp_path / "packed"
    assert (
        score(packed).message
        == "its data, 'synthetic', is not on the Hub; pass dataset_dir, a folder of the same data"
    )
    rows = synthetic.load_synthetic(32, 8)["validation"]
    folder = write_split("validation-00000-of-00001.parquet", sentence=rows["sentence"], label=rows["label"])
    done = verify(packed, dataset_dir=folder, metric=METRICS)
    assert [check.status for check in done.checks] == 7 * ["passed"], done
