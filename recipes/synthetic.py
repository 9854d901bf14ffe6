"""A synthetic text classification task, written by code: it needs no download, and a bag of words cannot solve it.

Every sentence is a made-up restaurant review from a small grammar. It praises one thing and finds fault with another,
and the label says which of the two the *food* gets:

    the soup was superb , but the waiter was not charming .         food praised
    the soup was not charming , but the waiter was superb .         food criticised

Each sentence has a twin, with its predicates swapped, that holds the same words and the other label: a bag of words is
at chance. A model has to bind each adjective to its subject and each negation to its adjective. These are no real
reviews, and accuracy here says nothing about language: only that the whole path works.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from glue_tasks import Task, first_rows

TASK = Task("synthetic", columns=("sentence",), labels=("food criticised", "food praised"), test=())
EXAMPLE = "the waitress was not charming , but the soup was superb ."

_FOOD = "bread breakfast coffee curry dessert fish lunch pasta pizza risotto salad soup steak stew".split()
_SERVICE = "barista bartender bellboy cashier doorman host hostess manager owner porter waiter waitress".split()
_PRAISE = "amazing charming delightful excellent fantastic good great lovely pleasant superb wonderful".split()
_BLAME = "awful bad disappointing dreadful horrible lousy mediocre miserable poor terrible unpleasant".split()
_PLAIN, _NEGATED = "was {adjective}", "was not {adjective}"
_FRAMES = [f"the {{}} {{}} , {joint} the {{}} {{}} ." for joint in ("but", "while", "yet", "whereas")]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Both shares leave a bag of words at chance. They give training a first foothold, without which it would have to find
# three conditions at once: the first clause alone says something, and most adjectives mean what they say.
_FOOD_FIRST_SHARE = 0.75
_NEGATED_SHARE = 0.2


def load_synthetic(
    max_train_samples: int | None = None, max_eval_samples: int | None = None, seed: int = 0
) -> DatasetDict:
    """Write the task's splits, `train` (8,000 rows) and `validation` (1,000): balanced, and no sentence twice.

    Args:
        max_train_samples, max_eval_samples (`int`, *optional*): keep the first rows only; twins follow each other.
        seed (`int`, *optional*, defaults to 0): the same seed writes the same rows.

    Example:

        >>> load_synthetic(max_train_samples=2)["train"].column_names
        ['sentence', 'label']
    """
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(TASK.labels))})
    twins = _distinct_twins(random.Random(seed))
    splits = DatasetDict()
    for split, size, limit in (("train", 8_000, max_train_samples), ("validation", 1_000, max_eval_samples)):
        rows = [row for _ in range(size // 2) for row in next(twins)]
        columns = {"sentence": [sentence for sentence, _ in rows], "label": [label for _, label in rows]}
        splits[split] = first_rows(Dataset.from_dict(columns, features), limit, split)
    return splits


def _distinct_twins(rng: random.Random) -> Iterator[list[tuple[str, int]]]:
    """Pairs of rows `(sentence, label)` with the same words and opposite labels, without end or repetition."""
    seen: set[str] = set()
    while True:
        twins = _twins(rng)
        if twins[0][0] not in seen:
            seen.update(sentence for sentence, _ in twins)
            yield twins


def _twins(rng: random.Random) -> list[tuple[str, int]]:
    food, service, frame = rng.choice(_FOOD), rng.choice(_SERVICE), rng.choice(_FRAMES)
    praise, blame = _predicate(rng, praises=True), _predicate(rng, praises=False)
    food_first = rng.random() < _FOOD_FIRST_SHARE
    rows = []
    for label, of_food, of_service in ((1, praise, blame), (0, blame, praise)):
        clauses = [(food, of_food), (service, of_service)]
        first, second = clauses if food_first else reversed(clauses)
        rows.append((frame.format(*first, *second), label))
    return rows


def _predicate(rng: random.Random, praises: bool) -> str:
    negated = rng.random() < _NEGATED_SHARE
    adjective = rng.choice(_PRAISE if praises != negated else _BLAME)
    return (_NEGATED if negated else _PLAIN).format(adjective=adjective)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer of the grammar's words, with BERT's special tokens."""
    texts = [*_FOOD, *_SERVICE, *_PRAISE, *_BLAME, _PLAIN, _NEGATED, *_FRAMES]
    words = sorted({word for text in texts for word in text.split() if "{" not in word})
    ids = {word: index for index, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, ids[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **dict(zip(names, _SPECIAL, strict=True))
    )


def save_tiny_bert(folder: str | Path) -> str:
    """Save a random BERT of two layers, and the task's tokenizer, where `from_pretrained` finds both.

    Args:
        folder (`str` or `Path`): where to; torch's global generator draws the weights.

    Returns:
        `str`: the folder.
    """
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # BERT's 0.02 is for widths ten times as large
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
