"""Other texts than a task has: what is drawn, from what, and how often."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import DebertaV2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

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
OTHERS = ["!", ",", "'", "-", "7", "##tail", "un", "n", "t", "elsewhere"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *OTHERS, *LETTERS])}
    made = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def embeddings(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Embedding:
    return table_of(tokenizer)


def table_of(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Embedding:
    return torch.nn.Embedding.from_pretrained(
        torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(3))
    )


def rows_of(texts: list[str], others: list[str] | None = None) -> Dataset:
    more = {} if others is None else {"other": others}
    return Dataset.from_dict({"sentence": texts, "label": list(range(len(texts))), **more})


def nearest(
    word: str, words: list[str], tokenizer: PreTrainedTokenizerFast, embeddings: torch.nn.Embedding
) -> set[str]:
    """In float64, one pair at a time."""
    table = embeddings.weight.double().numpy()
    own = table[tokenizer.convert_tokens_to_ids(word)]
    cosines = {}
    for other in set(words) - {word}:
        its = table[tokenizer.convert_tokens_to_ids(other)]
        cosines[other] = own @ its / (np.linalg.norm(own) * np.linalg.norm(its))
    return set(sorted(cosines, key=cosines.__getitem__, reverse=True)[:NEAREST])


def test_a_word_becomes_one_of_the_nearest(tokenizer: PreTrainedTokenizerFast, embeddings: torch.nn.Embedding) -> None:
    words = LETTERS[:40]  # nothing is taken from the others: they are in no text
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


def test_how_often_and_what_stays(tokenizer: PreTrainedTokenizerFast, embeddings: torch.nn.Embedding) -> None:
    random = np.random.default_rng(0)
    words = "  {}!,  7 untail aktail xyz ak's n't ca n't bl-cm bl7 {} , [MASK] "
    texts = [words.format(" ".join(random.choice(LETTERS, size=9)), random.choice(LETTERS)) for _ in range(400)]
    rows = replace_words(rows_of(texts), ["sentence"], tokenizer, embeddings, 0.3, seed=1)
    assert list(rows["label"]) == list(range(400)) and set(rows.column_names) == {"sentence", "label"}
    assert rows.features == rows_of(texts).features
    changed = 0
    for text, new in zip(texts, rows["sentence"], strict=True):
        # Spaces, signs, numbers, words of several tokens, unknown ones, contractions and compounds stay.
        assert re.sub(r"(?<= )[a-h][k-p](?=[ !])", "_", text) == re.sub(r"(?<= )[a-h][k-p](?=[ !])", "_", new)
        changed += sum(a != b for a, b in zip(text.split(), new.split(), strict=True))
    assert abs(changed - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5  # five deviations


def test_two_texts_and_their_seed(tokenizer: PreTrainedTokenizerFast, embeddings: torch.nn.Embedding) -> None:
    rows = rows_of(20 * [" ".join(LETTERS[:20])], 20 * [" ".join(LETTERS[20:]).upper()])
    given = (rows, ["sentence", "other"], tokenizer, embeddings)
    once, again, otherwise = (replace_words(*given, 0.5, seed)[:] for seed in (4, 4, 5))
    assert once == again
    for column in ("sentence", "other"):
        assert once[column] != otherwise[column] and len(set(once[column])) == 20
    assert replace_words(*given, 0.0, 4)[:] == rows[:]


def test_a_word_is_not_near_itself_in_capitals(tokenizer: PreTrainedTokenizerFast) -> None:
    embeddings = torch.nn.Embedding.from_pretrained(torch.ones(len(tokenizer), 2))
    rows = rows_of(["ak AK Ak"], ["bl"])
    rows = replace_words(rows, ["sentence", "other"], tokenizer, embeddings, 1.0, seed=0)
    assert rows["sentence"][0] == "bl bl bl" and rows["other"][0].lower() == "ak"


def byte_pairs() -> PreTrainedTokenizerFast:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *"abkl", "ak", "bl", "Ġak", "Ġbl"]
    merges = [("a", "k"), ("b", "l"), ("Ġ", "ak"), ("Ġ", "bl")]
    return RobertaTokenizerFast(vocab={token: n for n, token in enumerate(tokens)}, merges=merges)


def sentence_pieces() -> PreTrainedTokenizerFast:
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "▁", *"abkl", "▁ak", "▁bl"]
    return DebertaV2Tokenizer(vocab=[(token, -float(n)) for n, token in enumerate(tokens)])


@pytest.mark.parametrize("make", [byte_pairs, sentence_pieces])
def test_tokenizers_that_have_the_space_in_the_token(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    assert len(tokenizer.tokenize("bl ak bl")) == 3
    rows = rows_of(["ak bl akak, ak", "bl ak"])
    rows = replace_words(rows, ["sentence"], tokenizer, table_of(tokenizer), 1.0, seed=0)
    assert list(rows["sentence"]) == ["bl ak akak, bl", "ak bl"]


@pytest.mark.parametrize(("texts", "found"), [(["ak", "", "ak !"], "1 words .* 1 are"), ([" "], "0 words .* 0 are")])
def test_texts_of_less_than_two_words(
    texts: list[str], found: str, tokenizer: PreTrainedTokenizerFast, embeddings: torch.nn.Embedding
) -> None:
    with pytest.raises(ValueError, match=f"replace_words: of {found} one token of .*Drop the flag"):
        replace_words(rows_of(texts), ["sentence"], tokenizer, embeddings, 1.0, seed=0)
