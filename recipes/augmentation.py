"""More texts for a teacher to judge than a task has: what it says of them is all that a student needs."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

NEAREST = 10
"""Of so many nearest words one takes a word's place."""
WORD = re.compile(r"(?<![\w'’-])[^\W\d_]+(?![\w'’-])")
"""Letters that are no part of a contraction, as "does n't" has one, of a compound, or of a number."""


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
    return _with_texts(rows, column, joined)


def replace_words(
    rows: Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    embeddings: nn.Module,
    probability: float,
    seed: int,
) -> Dataset:
    """Texts in which words are replaced by near ones; the labels remain those of the texts as they were.

    A word (see [`WORD`]) that is one token is replaced with the given probability, by one of the [`NEAREST`] such
    words of the same rows whose embeddings are nearest by cosine. Those are of like use, and may say the opposite.

    Args:
        rows (`Dataset`): With texts.
        columns (`Sequence[str]`): Where those are.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        embeddings (`nn.Module`): Of its tokens, as `model.get_input_embeddings()`.
        probability (`float`): Of each such word, from 0 to 1.
        seed (`int`): Of what is drawn.

    Raises:
        ValueError: No two words of the texts are one token each.

    Example:

        >>> rows = load_task("sst2")["train"]  # doctest: +SKIP
        >>> replace_words(rows, ["sentence"], tokenizer, embeddings, 0.3, seed=0)["sentence"][2]  # doctest: +SKIP
        'this loves its heroine and communicates somewhere rather beauty about mankind nature '

    Source: after Jiao et al., TinyBERT, 2020, which asks a language model for such words, and else GloVe.
    """
    texts = {column: list(rows[column]) for column in columns}
    words = {word for of in texts.values() for text in of for word in WORD.findall(text)}
    near = _near_words(_single_tokens(sorted(words), tokenizer), embeddings)
    random = np.random.default_rng([seed, 1])  # `seed` itself draws what is joined

    def replaced(match: re.Match[str]) -> str:
        others = near.get(match[0])
        if others is None or random.random() >= probability:
            return match[0]
        return others[random.integers(len(others))]

    for column, of in texts.items():
        rows = _with_texts(rows, column, [WORD.sub(replaced, text) for text in of])
    return rows


def _with_texts(rows: Dataset, column: str, texts: list[str]) -> Dataset:
    return rows.remove_columns(column).add_column(column, texts, feature=rows.features[column])


def _single_tokens(words: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The token of each word that is a single one, within a text: behind a space."""
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    special = set(tokenizer.all_special_ids)
    tokens = {
        word: ids[0] for word, ids in zip(words, encoded, strict=True) if len(ids) == 1 and ids[0] not in special
    }
    if len(set(tokens.values())) < 2:
        raise ValueError(
            f"replace_words: of {len(words)} words of the training texts {len(tokens)} are one token of "
            f"{type(tokenizer).__name__}; allowed: two or more, so that one can take the other's place. Drop the flag."
        )
    return tokens


@torch.no_grad()
def _near_words(tokens: dict[str, int], embeddings: nn.Module) -> dict[str, list[str]]:
    """Of each word, those of the nearest tokens but its own, which it may share with itself in capitals."""
    words = {token: word for word, token in tokens.items()}
    numbers, texts = torch.tensor(list(words)), list(words.values())
    unit: Tensor = normalize(embeddings(numbers).float(), dim=-1)
    near: dict[int, list[str]] = {}
    for part, own in zip(unit.split(1024), numbers.split(1024), strict=True):
        cosine = (part @ unit.T).masked_fill(own[:, None] == numbers, -torch.inf)
        nearest = cosine.topk(min(NEAREST, len(texts) - 1)).indices.tolist()
        near.update(zip(own.tolist(), ([texts[i] for i in row] for row in nearest), strict=True))
    return {word: near[token] for word, token in tokens.items()}
