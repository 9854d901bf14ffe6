"""A short real training of a model with each kind of head, to the packed model: each learns a little task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertTokenizer,
    Trainer,
    default_data_collator,
)

from hf_stompp import BinarizationConfig, binarize, pack

WORDS, LENGTH, KEY = 20, 8, 7


def sentences(rows: int = 64) -> torch.Tensor:
    """Sentences in which the word `KEY` is once."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, WORDS, (rows, LENGTH), generator=generator)
    return ids.scatter(1, places(rows), KEY)


def places(rows: int) -> torch.Tensor:
    return torch.arange(rows).unsqueeze(1) * 3 % LENGTH


def classified() -> list[dict[str, Any]]:
    # Whether the key comes in the first half.
    labels = (places(64)[:, 0] < LENGTH // 2).long()
    return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(sentences(), labels, strict=True)]


def tagged() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids % 2} for ids in sentences()]


def chosen() -> list[dict[str, Any]]:
    rows = []
    for i, ids in enumerate(sentences()):
        choices = torch.stack([ids.masked_fill(ids == KEY, 9)] * 3)
        choices[i % 3] = ids
        rows.append({"input_ids": choices, "labels": i % 3})
    return rows


def answered() -> list[dict[str, Any]]:
    starts = places(64)[:, 0].tolist()
    return [
        {"input_ids": ids, "start_positions": at, "end_positions": at}
        for ids, at in zip(sentences(), starts, strict=True)
    ]


def masked() -> list[dict[str, Any]]:
    # All words of a sentence are the same, and one is hidden.
    rows = []
    for i, at in enumerate(places(64)[:, 0].tolist()):
        ids, labels = torch.full((LENGTH,), 8 + i % 4), torch.full((LENGTH,), -100)
        labels[at], ids[at] = ids[at], 4
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@pytest.mark.parametrize("config", [{"surrogate": "ste"}, {"activations": False}], ids=["W1A1", "W1A32"])
@pytest.mark.parametrize(
    ("auto", "data", "labels"),
    [
        (AutoModelForSequenceClassification, classified, 2),
        (AutoModelForTokenClassification, tagged, 2),
        (AutoModelForMultipleChoice, chosen, 1),
        (AutoModelForQuestionAnswering, answered, 2),
        (AutoModelForMaskedLM, masked, 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_head_is_trained_packed_and_loaded(
    auto: Any,
    data: Callable[[], list[dict[str, Any]]],
    labels: int,
    config: dict[str, Any],
    make_trainer: Callable[..., Trainer],
    reference_kernels: None,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    model = binarize(auto.from_config(bert), BinarizationConfig(progression_end=0.5, **config))
    trainer = make_trainer(
        model, data=data(), max_steps=120, per_device_train_batch_size=16, learning_rate=5e-3, weight_decay=0.0
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    start, end = sum(losses[:5]), sum(losses[-5:])
    assert end < 0.7 * start, (start / 5, end / 5)

    packed = pack(model.eval())
    packed.save_pretrained(tmp_path / "packed")
    reloaded = auto.from_pretrained(tmp_path / "packed").eval()
    batch = default_data_collator(data()[:8])
    with torch.no_grad():
        latent, loaded = model(**batch), reloaded(**batch)
    for name, value in latent.items():
        assert torch.equal(value, loaded[name]), name
    if auto is AutoModelForMaskedLM:
        assert reloaded.cls.predictions.decoder.weight is reloaded.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("config", [{}, {"activations": False}], ids=["W1A1", "W1A32"])
def test_sentence_embeddings(config: dict[str, Any], tmp_path: Path, reference_kernels: None) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses, modules

    from hf_stompp import StomppCallback

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    bert = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModel.from_config(bert).save_pretrained(tmp_path / "float")
    BertTokenizer({word: i for i, word in enumerate(words)}, model_max_length=16).save_pretrained(tmp_path / "float")

    quantization = {"quantization_config": BinarizationConfig(progression_end=0.5, **config)}
    transformer = modules.Transformer(str(tmp_path / "float"), model_kwargs=quantization)
    model = library.SentenceTransformer(modules=[transformer, modules.Pooling(32, "mean")], device="cpu")
    # Sentences of the same words are alike, whatever their order.
    anchors = [" ".join(f"w{(i + j) % WORDS}" for j in range(4)) for i in range(WORDS)]
    others = [" ".join(reversed(sentence.split())) for sentence in anchors]
    trainer = library.SentenceTransformerTrainer(
        model,
        library.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"), max_steps=60, per_device_train_batch_size=10, learning_rate=5e-3, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": anchors, "positive": others}),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[StomppCallback()],
    )  # fmt: skip
    trainer.train()
    history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(history[-5:]) < 0.7 * sum(history[:5])

    expected = model.encode(anchors)
    transformer.auto_model = pack(transformer.auto_model)
    model.save(str(tmp_path / "packed"))
    loaded = library.SentenceTransformer(str(tmp_path / "packed"), device="cpu").encode(anchors)
    assert (loaded == expected).all()
