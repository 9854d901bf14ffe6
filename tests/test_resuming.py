"""Which checkpoint is resumed from, and which runs may be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, Trainer

from hf_stompp import BinarizationConfig, last_checkpoint

MakeModel = Callable[..., PreTrainedModel]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def run(make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of step 8 and 16."""
    make_trainer(make_model(), save_strategy="steps", save_steps=8).train()
    return tmp_path


def test_the_last_of_whole_ones(run: Path) -> None:
    assert last_checkpoint(run) == str(run / "checkpoint-16")
    for name in ("checkpoint-99.tmp", "checkpoint-x", "my-checkpoint-99", "runs"):
        (run / name).mkdir()
    (run / "checkpoint-200").write_text("a file")
    assert last_checkpoint(str(run)) == str(run / "checkpoint-16")
    (run / "checkpoint-16").rename(run / "checkpoint-9")  # 9 > 8, and "9" > "16"
    assert last_checkpoint(run) == str(run / "checkpoint-9")


def test_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None


def test_a_file_that_is_cut_off_anywhere(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = run / "checkpoint-16"
    files = {path for path in last.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            if path.suffix == ".json" and length == len(content) - 1:
                continue  # the newline
            path.write_bytes(content[:length])
            assert last_checkpoint(run) == str(run / "checkpoint-8"), (path.name, length)
            assert path.name in caplog.messages[-1] and "not resumed from" in caplog.messages[-1]
        path.write_bytes(content)
        assert last_checkpoint(run) == str(last)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_an_absent_file(name: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-16" / name).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    assert ("no weights" if "model" in name else name) in caplog.text


def test_an_absent_shard(run: Path, make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    last = run / "checkpoint-16"
    (last / "model.safetensors").unlink()
    make_model().save_pretrained(last, max_shard_size="10KB")
    assert last_checkpoint(run) == str(last)
    shard = sorted(last.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    assert shard.name in caplog.text


def test_a_checkpoint_without_an_optimizer_is_one_that_was_asked_for(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(make_model(), save_strategy="steps", save_steps=8, save_only_model=True).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


# --- another config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"refresh": 0.5}, {"mask_seed": 7}, {"surrogate": "none", "clip": 2.5}, {"scale": "tensor"}], ids=str
)
def test_a_run_is_not_resumed_with_another_config(
    changed: dict[str, Any], run: Path, make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match="step 8 was trained with another BinarizationConfig: ") as caught:
        make_trainer(make_model(**changed)).train(resume_from_checkpoint=str(run / "checkpoint-8"))
    for field, value in changed.items():
        assert f"{field} was {getattr(BinarizationConfig(), field)!r}, and is {value!r}" in str(caught.value)


def test_a_checkpoint_that_says_nothing_of_its_config_is_resumed(
    run: Path, make_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    path = run / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("StomppCallback")["attributes"]["trained_with"]["refresh"] is not None
    path.write_text(json.dumps(state))
    trainer = make_trainer(make_model())
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-8"))
    assert trainer.state.global_step == 16


def test_callback_states_may_be_restored(run: Path, make_model: MakeModel, make_trainer: MakeTrainer) -> None:
    shutil.rmtree(run / "checkpoint-16")
    trainer = make_trainer(make_model(), restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(run))
    assert trainer.state.log_history[-2]["frozen_fraction"] == 1.0
    with pytest.raises(ValueError, match="another BinarizationConfig"):
        trainer = make_trainer(make_model(refresh=0.5), restore_callback_states_from_checkpoint=True)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-8"))
