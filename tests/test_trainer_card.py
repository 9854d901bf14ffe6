"""`Trainer.push_to_hub` publishes a card that says that the checkpoint is latent, with what is known of its run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from transformers import PreTrainedModel, Trainer

from hf_stompp import BinarizationConfig, trainer_card
from hf_stompp.checkpoint import load_complete
from hf_stompp.results import result_row
from hf_stompp.trainer_card import TrainerCard

REPO = "user/tiny-latent"
SCRIPT = """
import torch
from hf_stompp import StomppCallback
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

model = AutoModelForSequenceClassification.from_pretrained({folder!r})
model.config._name_or_path = "google-bert/bert-base-uncased"
ids = torch.randint(1, 60, (24, 6), generator=torch.Generator().manual_seed(0)).tolist()
data = [{{"input_ids": row, "labels": i % 2}} for i, row in enumerate(ids)]
arguments = dict(max_steps=16, per_device_train_batch_size=4, learning_rate=1e-2, seed=7, save_steps=8, eval_steps=8)
arguments |= dict(eval_strategy="steps", hub_model_id={repo!r}, use_cpu=True, report_to=[], disable_tqdm=True)
trainer = Trainer(
    model,
    TrainingArguments({output!r}, **(arguments | {changes!r})),
    train_dataset=data,
    eval_dataset=data[:8],
    compute_metrics=lambda out: {{"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())}},
    callbacks=[StomppCallback()],
)
{code}
result = [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
"""


@pytest.fixture
def train(
    run: Callable[[str], dict[str, Any]], make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> Callable[..., list[float]]:
    """Runs code on a Trainer in a fresh process; the accuracies that were logged."""
    make_model(progression_end=1.0).save_pretrained(tmp_path / "initial")

    def call(code: str, folder: str = "initial", **changes: Any) -> list[float]:
        output = str(tmp_path / "out")
        done = run(SCRIPT.format(folder=str(tmp_path / folder), output=output, repo=REPO, code=code, changes=changes))
        assert done["error"] is None, done["message"]
        return done["result"]

    return call


def card_of(commit: Any) -> ModelCard:
    return ModelCard(commit.files["README.md"].decode())


def test_the_card_of_a_push(
    hub: LoopbackHub,
    train: Callable[..., list[float]],
    run: Callable[[str], dict[str, Any]],
    tmp_path: Path,
) -> None:
    given = 'language="en", license="mit", tags="mine", dataset_tags="nyu-mll/glue", dataset_args="sst2"'
    code = f'trainer.train()\nfor _ in range(2):\n    trainer.push_to_hub({given}, dataset="GLUE SST-2")'
    accuracies = train(code, push_to_hub=True)
    card = card_of(hub.head(REPO))
    assert (card.data.base_model, card.data.base_model_relation) == ("google-bert/bert-base-uncased", "quantized")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], ["nyu-mll/glue"])
    assert {"1-bit", "hf_stompp", "mine", "generated_from_trainer"} <= set(card.data.tags)
    (score,) = card.data.eval_results
    assert (score.dataset_type, score.dataset_config, score.metric_type) == ("nyu-mll/glue", "sst2", "accuracy")
    assert (score.metric_value, score.metric_args) == (accuracies[-1], {"seed": 7, "mask_seed": 0})
    assert "The **latent** checkpoint of a BertForSequenceClassification" in card.text and "100% frozen" in card.text
    assert "16 steps of 4 examples; learning rate 0.01 (linear, 0 warmup steps)" in card.text
    assert f"| **this run, latent** | **{accuracies[-1]:.4f}** | **7** | **0** | **16** |" in card.text
    assert f"# {REPO}\n" in card.text and '"progression_end": 1.0' in card.text
    assert "hf_stompp.push(packed" in card.text and str(tmp_path) not in card.content

    # A push in the middle of training has the card of that step.
    (early,) = [commit for commit in hub.repos[REPO].commits if commit.title == "Training in progress, step 8"]
    text = card_of(early).text
    assert "57% frozen" in text and f"**{accuracies[0]:.4f}** | **7** | **0** | **8** |" in text
    size = len(early.files["model.safetensors"])
    assert f"**Weights:** {size:,} bytes" in text

    example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert run(f"import os\nos.chdir({str(tmp_path)!r})\n{example}")["error"] is None
    assert load_complete(tmp_path / "packed").config.quantization_config.mode == "packed"


def test_resumed_and_finished_runs(hub: LoopbackHub, train: Callable[..., list[float]], tmp_path: Path) -> None:
    train("trainer.train()")
    checkpoint = str(tmp_path / "out" / "checkpoint-8")
    accuracies = train(f"trainer.train(resume_from_checkpoint={checkpoint!r})\ntrainer.push_to_hub()")
    (score,) = card_of(hub.head(REPO)).data.eval_results
    assert len(accuracies) == 2 and score.metric_value == accuracies[-1] and score.dataset_split is None
    assert "16 steps of 4 examples" in card_of(hub.head(REPO)).text
    # A Trainer that has not trained knows neither how the model was trained nor how it scored.
    train("trainer.push_to_hub()", folder="out")
    card = card_of(hub.head(REPO))
    assert "100% frozen" in card.text and "None was recorded." in card.text and "steps of" not in card.text
    assert not card.data.eval_results


def test_scores_of_an_earlier_step_are_not_the_checkpoints(
    make_model: Callable[..., PreTrainedModel], make_trainer: Callable[..., Trainer], examples: list[dict[str, Any]]
) -> None:
    trainer = make_trainer(make_model(), trainer={"eval_dataset": examples[:8]}, eval_strategy="steps", eval_steps=6)
    trainer.train()
    # As of a Trainer that does not evaluate at the end.
    logs = trainer.state.log_history
    trainer.state.log_history = [log for log in logs if log["step"] < 16 or "eval_loss" not in log]
    before = torch.get_rng_state()
    TrainerCard.install(trainer)
    trainer.create_model_card()
    assert torch.equal(torch.get_rng_state(), before)
    assert TrainerCard.install(trainer) is trainer.create_model_card  # not one around the other
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert not card.data.eval_results
    assert "On data that was not named:" in card.text and "This checkpoint was not scored: the row" in card.text
    loss = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert f"| this run, latent | {loss:.4f} | 42 | 0 | 12 |" in card.text


def test_what_fails_leaves_the_stock_card(
    tiny_model: Callable[..., PreTrainedModel],
    make_model: Callable[..., PreTrainedModel],
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    TrainerCard.install(make_trainer(tiny_model("bert")))()
    assert "generated automatically" in (tmp_path / "README.md").read_text()
    assert "stays the Trainer's own" in caplog.text and "BertForSequenceClassification is not binarized" in caplog.text

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no template")

    monkeypatch.setattr(trainer_card, "render", broken)
    TrainerCard.install(make_trainer(make_model()))()
    assert "generated automatically" in (tmp_path / "README.md").read_text() and "no template" in caplog.text


def test_a_card_of_the_users_stays_during_training(
    make_model: Callable[..., PreTrainedModel], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer, path = make_trainer(make_model()), tmp_path / "README.md"
    path.write_text("mine")
    card = TrainerCard.install(trainer)
    card.write_early()
    assert path.read_text() == "mine"
    path.unlink()
    card.write_early()
    assert "0% frozen" in path.read_text() and "2.0" in path.read_text()
    trainer.model.config.quantization_config = BinarizationConfig(clip=1.5)
    card.write_early()
    assert '"clip": 1.5' in path.read_text()
    path.write_text(path.read_text() + "mine")
    card.write_early()
    assert path.read_text().endswith("mine")


def test_only_the_loss_itself_is_left_out(tmp_path: Path) -> None:
    metrics = {"eval_loss": 1, "eval_matched_loss": 2, "eval_dev_loss": 3, "eval_hamming_loss": 4, "eval_f1": 5}
    row = result_row("latent", metrics, tmp_path, ["dev"])
    assert {key for key in row if key not in ("model", "bytes", "eval_seconds")} == {"hamming_loss", "f1"}
