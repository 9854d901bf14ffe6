"""The examples that activation scales are calibrated on, and the models that take them in another form."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from hf_stompp import StomppCallback, calibrate
from hf_stompp.patching import binary_layers
from hf_stompp.sampling import calibration_batches

MakeModel = Callable[..., PreTrainedModel]
ARGS = TrainingArguments("unused", use_cpu=True)


class Encoder(nn.Module):
    """A model around another, that takes all in one argument, as a `SentenceTransformer` does, and writes into it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: dict[str, Any]) -> dict[str, Any]:
        taken = {key: input[key] for key in ("input_ids", "attention_mask") if key in input}
        input["embedding"] = self.model(**taken).logits
        return input


def columns_of(batch: dict[str, Any]) -> tuple[list[Any], None]:
    """What `SentenceTransformerTrainer.collect_features` gives."""
    return [{"input_ids": batch[name]} for name in ("anchor", "positive")], None


def batches(model: nn.Module, rows: list[dict[str, Any]], collect: Any = columns_of) -> list[dict[str, Any]]:
    trainer = SimpleNamespace(collect_features=collect) if collect else None
    loader: Any = DataLoader(rows, batch_size=4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    return calibration_batches(trainer, model, loader, ARGS)


def pairs(count: int = 8) -> list[dict[str, Any]]:
    return [{"anchor": [i + 1, 2, 3], "positive": [3, 2]} for i in range(count)]


def test_the_first_column_comes_last(make_model: MakeModel) -> None:
    found = batches(Encoder(make_model()), pairs())
    assert [one["input"]["input_ids"].tolist() for one in found] == [[[3, 2]] * 4, [[i, 2, 3] for i in (1, 3, 5, 7)]]


def test_rows_of_several_data_sets_are_not_mixed(make_model: MakeModel) -> None:
    rows = [*pairs(4), *({"query": [9], "answer": [9]} for _ in range(4))]
    (*_, first) = batches(Encoder(make_model()), rows)
    assert first["input"]["input_ids"].tolist() == [[1, 2, 3], [3, 2, 3]]


def test_what_the_model_does_not_take_is_no_batch(make_model: MakeModel) -> None:
    assert batches(Encoder(make_model()), pairs(), collect=None) == []
    assert batches(Encoder(make_model()), pairs(), collect=lambda batch: ([["a text", "another"]], None)) == []


def test_a_model_around_another_is_calibrated_as_that_without_padding(
    make_model: MakeModel, tiny_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    inside, around, batch = make_model(), make_model(), tiny_batch()
    calibrate(inside, batch)
    calibrate(Encoder(around), {"input": dict(batch)})
    for name, layer in binary_layers(inside).items():
        other = binary_layers(around)[name]
        assert torch.equal(layer.get_parameter("activation_scale"), other.get_parameter("activation_scale")), name


class PairTrainer(Trainer):
    """One of a model that is given texts as they are, as a `CrossEncoderTrainer`'s is."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        scores = model({"input_ids": inputs["anchor"]})["embedding"]
        return scores.square().mean()


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_trainer_whose_batches_are_not_the_models_is_told_what_to_do(
    calibrated: bool, make_model: MakeModel, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Encoder(make_model())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=16, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = PairTrainer(model, arguments, train_dataset=pairs(), callbacks=[StomppCallback()])  # type: ignore[arg-type]
    if not calibrated:
        with pytest.raises(ValueError, match=r"no keyword arguments of the model.* Call hf_stompp\.calibrate"):
            trainer.train()
        return
    calibrate(model.model, {"input_ids": torch.tensor([[1, 2, 3]])})
    trainer.train()
    assert trainer.state.global_step == 16
    assert "units are not calibrated again when their windows begin" in caplog.text
