"""Tiny stand-ins for what the recipes load: GLUE folders of parquet files and a pretrained BERT."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import AutoModel, set_seed

import synthetic


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the copies that `datasets` makes of the tests' files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a "pretrained" model: the demo's, untrained, and without a head, as on the Hub."""
    set_seed(0)
    folder = synthetic.save_tiny_bert(tmp_path_factory.mktemp("tiny_bert"))
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., Path]:
    """Writes a parquet file: `write_split("sst2/train.parquet", sentence=[…], label=[…])` → the folder of all."""
    root = tmp_path / "data"

    def write(path: str, **columns: list[Any]) -> Path:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns).to_parquet(root / path)
        return root

    return write


@pytest.fixture
def sst2_folder(write_split: Callable[..., Path]) -> Path:
    """SST-2 of eight training and four validation sentences, four test sentences with hidden labels."""
    sentences = ["the soup was good", "the soup was bad", "the waiter was great", "the fish was awful"]
    write_split("sst2/train.parquet", sentence=sentences * 2, label=[1, 0, 1, 0] * 2)
    write_split("sst2/validation.parquet", sentence=sentences, label=[1, 0, 1, 0])
    return write_split("sst2/test.parquet", sentence=sentences, label=[-1] * 4)
