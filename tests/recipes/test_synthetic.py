"""The synthetic task: balanced, free of leaks, out of reach for a bag of words and within reach of a tiny BERT."""

from collections import defaultdict
from pathlib import Path

import pytest
from datasets import DatasetDict
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoConfig, AutoTokenizer

import run_glue
import synthetic

CONFIGS = Path(run_glue.__file__).parent / "configs"


@pytest.fixture(scope="module")
def data() -> DatasetDict:
    return synthetic.load_synthetic()


def test_splits_are_balanced_and_disjoint(data: DatasetDict) -> None:
    assert {split: len(rows) for split, rows in data.items()} == {"train": 8_000, "validation": 1_000}
    for rows in data.values():
        assert sum(rows["label"]) * 2 == len(rows)
    sentences = [*data["train"]["sentence"], *data["validation"]["sentence"]]
    assert len(set(sentences)) == len(sentences)


def test_twins_have_the_same_words_and_opposite_labels(data: DatasetDict) -> None:
    for rows in data.values():
        labels = defaultdict(list)
        for row in rows:
            labels[tuple(sorted(row["sentence"].split()))].append(row["label"])
        assert all(sum(both) * 2 == len(both) for both in labels.values())


def test_the_label_follows_from_the_sentence(data: DatasetDict) -> None:
    for row in data["validation"]:
        first, second = row["sentence"].split(" , ")
        words = (first if set(first.split()) & set(synthetic._FOOD) else second).split()
        praised = bool(set(words) & set(synthetic._PRAISE)) != ("not" in words)
        assert row["label"] == praised


def test_the_seed_decides(data: DatasetDict) -> None:
    assert synthetic.load_synthetic(10, 4)["train"]["sentence"][:] == data["train"]["sentence"][:10]
    assert len(synthetic.load_synthetic(10, 4)["validation"]) == 4
    assert synthetic.load_synthetic(10, seed=1)["train"]["sentence"][:] != data["train"]["sentence"][:10]


def test_a_bag_of_words_is_near_chance(data: DatasetDict) -> None:
    words = CountVectorizer().fit(data["train"]["sentence"])
    model = LogisticRegression().fit(words.transform(data["train"]["sentence"]), data["train"]["label"])
    assert model.score(words.transform(data["validation"]["sentence"]), data["validation"]["label"]) < 0.6


def test_tokenizer_knows_every_word_and_reloads(data: DatasetDict, tiny_bert: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    ids = tokenizer([*data["validation"]["sentence"], synthetic.EXAMPLE])["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in ids)
    assert tokenizer("The Soup was GOOD").tokens() == ["[CLS]", "the", "soup", "was", "good", "[SEP]"]
    assert AutoConfig.from_pretrained(tiny_bert).vocab_size == len(tokenizer)


def test_a_tiny_bert_learns_it(tmp_path: Path) -> None:
    flags = "--task_name synthetic --do_train --max_steps 150 --per_device_train_batch_size 64 --learning_rate 2e-3"
    rest = f"--warmup_steps 30 --save_strategy no --dataloader_pin_memory False --output_dir {tmp_path}"
    results = run_glue.main(f"{flags} {rest}".split())
    assert results["rows"][0]["accuracy"] > 0.95


@pytest.mark.slow
def test_a_one_bit_bert_learns_it(tmp_path: Path) -> None:
    latent, packed = run_glue.main([str(CONFIGS / "demo.yaml"), "--output_dir", str(tmp_path)])["rows"]
    assert latent["accuracy"] > 0.95
    assert packed["accuracy"] == pytest.approx(latent["accuracy"], abs=0.002)
    assert packed["bytes"] * 5 < latent["bytes"]
