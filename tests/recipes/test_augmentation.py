"""Other texts than a task has: what is drawn, from what, and how often."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

from augmentation import NEAREST, join_texts, replace_words


def test_joined_texts() -> None:
    texts = [f" word{i} " for i in range(3000)]
    rows = Dataset.from_dict({"sentence": texts, "label": list(range(3000))})
    joined = join_texts(rows, "sentence", 3, seed=7)
    words = [text.split(" ") for text in joined["sentence"]]
    assert [row[0] for row in words] == [text.strip() for text in texts]  # each comes first once, with its label
    assert list(joined["label"]) == list(range(3000))
    assert {word for row in words for word in row} == {text.strip() for text in texts}
    numbers = [sum(len(row) == number for row in words) for number in (1, 2, 3)]
    assert sum(numbers) == 3000 and all(abs(number - 1000) < 5 * 26 for number in numbers)  # five deviations
    others = [int(row[1].removeprefix("word")) for row in words if len(row) > 1]
    assert abs(sum(others) / len(others) - 1499.5) < 5 * 866 / len(others) ** 0.5
    assert list(join_texts(rows, "sentence", 3, seed=7)["sentence"]) == list(joined["sentence"])
    assert list(join_texts(rows, "sentence", 3, seed=8)["sentence"]) != list(joined["sentence"])


LETTERS = [f"{first}{second}" for first in "abcdefgh" for second in "klmnop"]  # 48 words
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OTHERS = ["!", ",", "7", "##tail", "un", "elsewhere"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *OTHERS, *LETTERS])}
    made = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def embeddings(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(3))


def rows_of(texts: list[str], others: list[str] | None = None) -> Dataset:
    more = {} if others is None else {"other": others}
    return Dataset.from_dict({"sentence": texts, "label": list(range(len(texts))), **more})


def nearest(word: str, words: list[str], tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> set[str]:
    """In float64, one pair at a time."""
    table = embeddings.double().numpy()
    own = table[tokenizer.convert_tokens_to_ids(word)]
    cosines = {}
    for other in set(words) - {word}:
        its = table[tokenizer.convert_tokens_to_ids(other)]
        cosines[other] = own @ its / (np.linalg.norm(own) * np.linalg.norm(its))
    return set(sorted(cosines, key=cosines.__getitem__, reverse=True)[:NEAREST])


def test_a_word_becomes_one_of_the_nearest(tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
    words = LETTERS[:40]  # of the others' embeddings nothing is taken: they are in no text
    texts = 50 * [" ".join(words)]
    drawn: dict[str, Counter[str]] = {word: Counter() for word in words}
    for text in replace_words(rows_of(texts), ["sentence"], tokenizer, embeddings, 1.0, seed=5)["sentence"]:
        for before, after in zip(words, text.split(" "), strict=True):
            drawn[before][after] += 1
    for word in words:
        assert set(drawn[word]) <= nearest(word, words, tokenizer, embeddings)
    counts = [count for of in drawn.values() for count in of.values()]
    assert sum(counts) == 2000 and len(counts) > 390  # of 400 pairs, each 5 times on average: all alike
    assert max(counts) < 5 + 5 * 5**0.5 + 3


def test_how_often_and_what_stays(tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
    random = np.random.default_rng(0)
    texts = [f"  {' '.join(random.choice(LETTERS, size=10))}!,  7 untail {LETTERS[0]}tail xyz " for _ in range(400)]
    rows = replace_words(rows_of(texts), ["sentence"], tokenizer, embeddings, 0.3, seed=1)
    assert list(rows["label"]) == list(range(400)) and set(rows.column_names) == {"sentence", "label"}
    changed = 0
    for before, after in zip(texts, rows["sentence"], strict=True):
        # Spaces, signs, numbers, words of several tokens and unknown ones stay as they are.
        assert re.sub(r"\b[a-h][k-p]\b", "_", before) == re.sub(r"\b[a-h][k-p]\b", "_", after)
        changed += sum(a != b for a, b in zip(before.split(), after.split(), strict=True))
    assert abs(changed - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5  # five deviations


def test_two_texts_and_their_seed(tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
    rows = rows_of(20 * [" ".join(LETTERS[:20])], 20 * [" ".join(LETTERS[20:]).upper()])
    given = (rows, ["sentence", "other"], tokenizer, embeddings)
    once, again, otherwise = (replace_words(*given, 0.5, seed)[:] for seed in (4, 4, 5))
    assert once == again
    for column in ("sentence", "other"):
        assert once[column] != otherwise[column] and len(set(once[column])) == 20
    capitals = [word.isupper() for text in once["other"] for word in text.split()]
    assert 0 < sum(capitals) < len(capitals)  # an uncased tokenizer writes what it draws in its own letters
    assert replace_words(*given, 0.0, 4)[:] == rows[:]
    assert replace_words(*given, 1.0, 4)["sentence"][0] != rows["sentence"][0]


def test_a_word_with_two_tokens_is_not_near_itself() -> None:
    """Byte pairs have another token for a word at the beginning of a text."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *"abkl", "ak", "bl", "Ġak", "Ġbl"]
    merges = [("a", "k"), ("b", "l"), ("Ġ", "ak"), ("Ġ", "bl")]
    tokenizer = RobertaTokenizerFast(vocab={token: n for n, token in enumerate(tokens)}, merges=merges)
    assert tokenizer.tokenize("ak bl ak") == ["ak", "Ġbl", "Ġak"]
    embeddings = torch.ones(len(tokenizer), 2)
    rows = replace_words(rows_of(["ak bl ak", "bl ak"]), ["sentence"], tokenizer, embeddings, 1.0, seed=0)
    assert list(rows["sentence"]) == ["bl ak bl", "ak bl"]


def test_a_single_word_stays(tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
    rows = rows_of(["ak", "", "ak !"])
    assert replace_words(rows, ["sentence"], tokenizer, embeddings, 1.0, seed=0)[:] == rows[:]


def test_it_needs_to_know_where_words_are(tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="replace_words: Slow is a slow tokenizer; allowed: a fast one"):
        replace_words(rows_of(["ak"]), ["sentence"], Slow(), embeddings, 0.5, seed=0)
