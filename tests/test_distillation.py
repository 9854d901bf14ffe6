"""Distillation: its losses in float64, that a student comes to what its teacher says, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from hf_stompp import BinarizationConfig, StomppCallback, binarize
from hf_stompp.distillation import CACHED, DistillationTrainer, hidden_loss, logits_loss, with_teacher_logits
from hf_stompp.patching import binary_layers

Make = Callable[..., DistillationTrainer]


def bert(layers: int = 2, seed: int = 0, **config: Any) -> PreTrainedModel:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = {"num_hidden_layers": layers, "initializer_range": 0.3}  # or all logits would be as good as 0
    return BertForSequenceClassification(BertConfig(**(shape | dropout | more | config)))


def data(lengths: tuple[int, ...] = (3, 6)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(24):
        ids = torch.randint(1, 50, (lengths[i % len(lengths)],), generator=generator).tolist()
        padded = ids + [0] * (max(lengths) - len(ids))
        rows.append(
            {"input_ids": padded, "attention_mask": [int(j < len(ids)) for j in range(max(lengths))], "labels": i % 2}
        )
    return rows


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(model: Any, teacher: Any, callbacks: Any = None, rows: Any = None, **options: Any) -> DistillationTrainer:
        arguments: dict[str, Any] = dict(
            max_steps=16, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        arguments |= options.pop("arguments", {})
        args = TrainingArguments(str(tmp_path / "out"), **arguments)
        rows = rows or data()
        return DistillationTrainer(
            model, args, train_dataset=rows, eval_dataset=data(), callbacks=callbacks, teacher=teacher, **options
        )

    return made


def softmax(z: Any) -> Any:
    powers = np.exp(z - z.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def of_numpy(student: Any, teacher: Any, batch: dict[str, Tensor], t: float, w: dict[str, float]) -> float:
    """The loss by its formula, in float64."""
    with torch.no_grad():
        ours, theirs = (model.double()(**batch, output_hidden_states=True) for model in (student, teacher))
    p, q = (softmax(out.logits.numpy() / t) for out in (theirs, ours))
    kl = (p * (np.log(p) - np.log(q))).sum(-1).mean() * t**2
    seen = batch["attention_mask"].bool().numpy()
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    hidden = np.mean([((a.numpy()[seen] - b.numpy()[seen]) ** 2).mean() for a, b in pairs])
    picked = softmax(ours.logits.numpy())[np.arange(len(seen)), batch["labels"].numpy()]
    return w["logits"] * kl + w["hidden"] * hidden + w["labels"] * -np.log(picked).mean()


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2.0, 0.25)])
def test_the_loss_is_that_of_its_formula(weights: tuple[float, float, float], make: Make) -> None:
    student, teacher = bert(seed=0).train(), bert(seed=1)
    named = dict(zip(("logits_weight", "hidden_weight", "labels_weight"), weights, strict=True))
    trainer = make(student, teacher, temperature=2.0, **named)
    batch = {
        name: torch.tensor([row[name] for row in data()[:5]]) for name in ("input_ids", "attention_mask", "labels")
    }
    found = trainer.compute_loss(student, batch).item()
    plain = {name.removesuffix("_weight"): value for name, value in named.items()}
    assert found == pytest.approx(
        of_numpy(copy.deepcopy(student), copy.deepcopy(teacher), batch, 2.0, plain), rel=1e-5
    )


def test_a_regression_is_compared_by_squares() -> None:
    assert logits_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]), 3.0).item() == pytest.approx(2.5)


def test_a_deeper_teacher_is_asked_where_it_is_as_far() -> None:
    states = [torch.full((1, 2, 4), float(i)) for i in range(5)]
    student = tuple(states[i] + 1 for i in (0, 2, 4))
    assert hidden_loss(student, tuple(states), None).item() == pytest.approx(1.0)


def test_a_student_comes_to_what_its_teacher_says(make: Make) -> None:
    teacher = bert(seed=1)
    model = binarize(bert(seed=1), BinarizationConfig(surrogate="ste", progression_end=0.5))
    untaught = copy.deepcopy(model)
    for layer in binary_layers(untaught).values():
        layer.set_frozen(1.0, step=1)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(model, teacher, callbacks=[StomppCallback()], arguments={"max_steps": 120, "learning_rate": 3e-3})
    trainer.train()
    assert all(layer.fraction == 1.0 for layer in binary_layers(model).values())
    batch = {name: torch.tensor([row[name] for row in data()]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        meant = teacher(**batch).logits
        apart = [logits_loss(each.eval()(**batch).logits, meant, 1.0).item() for each in (untaught, model)]
    assert apart[1] < apart[0] / 5
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and not any("teacher" in name for name in model.state_dict())


def test_evaluation_is_the_trainers(make: Make) -> None:
    student = bert(seed=0)
    trainer = make(student, bert(seed=1), hidden_weight=1.0)
    plain = Trainer(student, trainer.args, eval_dataset=data())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_accumulated_batches_give_the_same_gradient(make: Make) -> None:
    losses = []
    for size, times in ((4, 1), (2, 2)):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        trainer = make(bert(seed=0), bert(seed=1), rows=data((6,)), arguments=arguments | {"max_steps": 6})
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_activation_checkpointing_trains_alike(make: Make) -> None:
    ends = []
    for on in (False, True):
        model = bert(seed=0)
        make(model, bert(seed=1), hidden_weight=1.0, arguments={"gradient_checkpointing": on}).train()
        ends.append(model.state_dict())
    assert all(torch.allclose(value, ends[1][name], atol=1e-6) for name, value in ends[0].items())


def test_a_cached_teacher_is_not_asked_again(make: Make, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    teacher, rows = bert(seed=1), datasets.Dataset.from_list(data())

    def collate(batch: list[Any]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    cached = with_teacher_logits(rows, teacher, collate, batch_size=5)
    with torch.no_grad():
        expected = teacher(**{n: torch.tensor(rows[n]) for n in ("input_ids", "attention_mask")}).logits
    assert torch.allclose(torch.tensor(cached[CACHED]), expected, atol=1e-5)
    assert with_teacher_logits(rows, teacher, collate)._fingerprint == cached._fingerprint
    assert with_teacher_logits(rows, bert(seed=2), collate)._fingerprint != cached._fingerprint

    ends = []
    for train_set in (rows, cached):
        model = binarize(bert(seed=0), BinarizationConfig(surrogate="ste"))
        trainer = make(model, teacher, rows=train_set, callbacks=[StomppCallback()])
        if train_set is cached:
            trainer.teacher.forward = None  # whoever asks it fails
        trainer.train()
        ends.append(model.state_dict())
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "labels": ({"num_labels": 3}, {}, "teacher: its num_labels is 3, and the model's is 2"),
    "names of labels": ({"id2label": {0: "b", 1: "a"}}, {}, "teacher: its labels are"),
    "vocabulary": ({"vocab_size": 60}, {}, "teacher: its vocab_size is 60"),
    "width": ({"hidden_size": 32}, {"hidden_weight": 1.0}, "its hidden_size is 32.*set hidden_weight=0"),
    "no weight": ({}, {"logits_weight": 0.0}, "logits_weight: received 0.0; allowed: 0 or more, and one of"),
    "negative": ({}, {"hidden_weight": -1.0}, "hidden_weight: received -1.0"),
    "temperature": ({}, {"temperature": 0.0}, "temperature: received 0.0; allowed: above 0"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_taught_is_refused(case: str, make: Make) -> None:
    config, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(bert(), bert(**config), **options)


def test_a_wider_teacher_has_logits_all_the_same(make: Make) -> None:
    student, before = bert(), bert().state_dict()
    trainer = make(student, bert(hidden_size=32))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 16 and all(0 < loss < 100 for loss in losses)
    assert not torch.equal(student.classifier.weight, before["classifier.weight"])


def test_the_teacher_is_loaded_by_its_folder(make: Make, tmp_path: Path) -> None:
    bert(seed=1).save_pretrained(tmp_path / "teacher")
    trainer = make(bert(), str(tmp_path / "teacher"))
    assert torch.equal(trainer.teacher.classifier.weight, bert(seed=1).classifier.weight)
    assert not trainer.teacher.training and not any(p.requires_grad for p in trainer.teacher.parameters())
