"""More texts for a teacher to judge than a task has: what it says of them is all that a student needs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

NEAREST = 10
"""Of so many nearest words one takes a word's place."""


def join_texts(rows: Dataset, column: str, most: int, seed: int) -> Dataset:
    """Each text with 0 to `most - 1` random others of the same rows behind it, as many of each number.

    Longer texts than the task has, and other ones: the labels remain those of the first text.

    Example:

        >>> rows = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 0]})
        >>> list(join_texts(rows, "sentence", 3, seed=3)["sentence"])
        ['a c a', 'b a', 'c']
    """
    random, texts = np.random.default_rng(seed), list(rows[column])
    others = random.integers(len(texts), size=(len(texts), most - 1))
    numbers = random.integers(most, size=len(texts))
    joined = [
        " ".join([text.strip(), *(texts[other].strip() for other in row[:number])])
        for text, row, number in zip(texts, others, numbers, strict=True)
    ]
    return rows.remove_columns(column).add_column(column, joined)


def replace_words(
    rows: Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    embeddings: Tensor,
    probability: float,
    seed: int,
) -> Dataset:
    """Texts in which words are replaced by words like them; the labels remain those of the texts as they were.

    A word that is one token, of letters alone, is replaced with the given probability, by one of the [`NEAREST`] such
    words of the same rows, whose embeddings are nearest by cosine.

    Args:
        rows (`Dataset`): With texts.
        columns (`Sequence[str]`): Where those are.
        tokenizer (`PreTrainedTokenizerBase`): A fast one.
        embeddings (`Tensor`): Of its tokens, (vocabulary, width).
        probability (`float`): Of a word, from 0 to 1.
        seed (`int`): Of what is drawn.

    Raises:
        ValueError: The tokenizer is not a fast one, which alone knows where words are.

    Example:

        >>> rows[0], replace_words(rows, ["sentence"], tokenizer, embeddings, 0.3, seed=0)[0]  # doctest: +SKIP
        ({'sentence': 'goes to absurd lengths'}, {'sentence': 'goes to bizarre lengths'})

    Source: Jiao et al., TinyBERT, 2020, which takes what a language model and GloVe say.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"replace_words: {type(tokenizer).__name__} is a slow tokenizer; allowed: a fast one, which knows where "
            "words are. Load it by AutoTokenizer.from_pretrained, or drop the flag."
        )
    known = {token for column in columns for words in _words(rows[column], tokenizer) for token, *_ in words}
    near, random = _near_words(known, tokenizer, embeddings.detach()), np.random.default_rng(seed)
    for column in columns:
        words = _words(rows[column], tokenizer)
        replaced = [
            _replaced(text, of, near, probability, random) for text, of in zip(rows[column], words, strict=True)
        ]
        rows = rows.remove_columns(column).add_column(column, replaced)
    return rows


Word = tuple[int, int, int]
"""Its token, and where it begins and ends in its text."""


def _words(texts: Sequence[str], tokenizer: Any, batch: int = 1000) -> Iterator[list[Word]]:
    """Of each text, the words that are one token, not the unknown one, and of letters alone."""
    special = set(tokenizer.all_special_ids)
    for begin in range(0, len(texts), batch):
        part = list(texts[begin : begin + batch])
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        for row, text in enumerate(part):
            tokens, places = encoded["input_ids"][row], encoded["offset_mapping"][row]
            of = [None, *encoded.word_ids(row), None]  # the word of each token, and of what is around them
            alone = [token not in special and of[i] != of[i + 1] != of[i + 2] for i, token in enumerate(tokens)]
            words = zip(tokens, places, alone, strict=True)
            yield [(token, *place) for token, place, whole in words if whole and text[slice(*place)].isalpha()]


def _near_words(known: set[int], tokenizer: Any, embeddings: Tensor) -> dict[int, list[str]]:
    """Of each token, the nearest words that are not itself, the nearest first."""
    texts = {token: tokenizer.decode([token]).strip() for token in sorted(known)}
    candidates = {text: token for token, text in texts.items()}  # within a text and at its beginning they may be two
    words, others = list(candidates), normalize(embeddings[list(candidates.values())].float(), dim=-1)
    parts = normalize(embeddings[list(texts)].float(), dim=-1).split(1024)
    nearest = [row for part in parts for row in (part @ others.T).topk(min(len(words), NEAREST + 1)).indices.tolist()]
    ordered = {token: [words[i] for i in row] for token, row in zip(texts, nearest, strict=True)}
    return {token: [word for word in ordered[token] if word != texts[token]][:NEAREST] for token in texts}


def _replaced(text: str, words: list[Word], near: dict[int, list[str]], probability: float, random: Any) -> str:
    parts, begin = [], 0
    for token, start, end in words:
        if random.random() < probability and near[token]:
            parts += [text[begin:start], near[token][random.integers(len(near[token]))]]
            begin = end
    return "".join([*parts, text[begin:]])
