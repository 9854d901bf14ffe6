"""Which checkpoint is resumed from, and which runs may be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save
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


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_an_absent_file(name: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-16" / name).unlink()
    (run / "checkpoint-16" / "model_card.md").write_text("no weights")
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    assert ("no weights" if "model" in name else name) in caplog.text


def test_other_files_may_be_as_they_are(run: Path) -> None:
    (run / "checkpoint-16" / "notes.json").write_text('{"a": 1}\n{"a": 2}\n')
    (run / "checkpoint-16" / "vocabulary.bin").write_bytes(b"no archive")
    assert last_checkpoint(run) == str(run / "checkpoint-16")


def test_the_random_state_of_each_process(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = run / "checkpoint-16"
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["StomppCallback"]["attributes"]["processes"] == 1
    state["stateful_callbacks"]["StomppCallback"]["attributes"]["processes"] = 2
    (last / "trainer_state.json").write_text(json.dumps(state))
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    assert "no rng_state_1.pth" in caplog.text
    shutil.copy(last / "rng_state_0.pth", last / "rng_state_1.pth")
    assert last_checkpoint(run) == str(last)


def test_shards_without_their_list(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = run / "checkpoint-16"
    (last / "model.safetensors").unlink()
    (last / "pytorch_model_fsdp_0").mkdir()
    (last / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    assert "pytorch_model_fsdp_0 has no .metadata" in caplog.text


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_archives_of_deepspeed_that_are_cut_off(name: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run / "checkpoint-16" / "global_step16" / name
    path.parent.mkdir()
    torch.save({"module": torch.ones(9)}, path)
    assert last_checkpoint(run) == str(run / "checkpoint-16")
    content = path.read_bytes()
    for length in (0, len(content) // 2):
        path.write_bytes(content[:length])
        assert last_checkpoint(run) == str(run / "checkpoint-8")
        assert f"global_step16/{name} is cut off" in caplog.messages[-1]


def test_shards_that_are_cut_off(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    last, folder = run / "checkpoint-16", run / "checkpoint-16" / "pytorch_model_fsdp_0"
    (last / "model.safetensors").unlink()
    save({"weight": torch.ones(9)}, checkpoint_id=folder)
    assert last_checkpoint(run) == str(last)
    for path in (*folder.glob("*.distcp"), folder / ".metadata"):
        content = path.read_bytes()
        for length in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert last_checkpoint(run) == str(run / "checkpoint-8"), (path.name, length)
            assert "pytorch_model_fsdp_0/.metadata is cut off" in caplog.messages[-1]
        path.write_bytes(content)


def test_of_several_runs_in_a_folder_the_one_that_wrote_last(
    run: Path, make_model: MakeModel, make_trainer: MakeTrainer, make_recorder: Callable[..., Any]
) -> None:
    # It was begun anew, with other settings, and stopped before it came as far as the older one.
    make_trainer(make_model(), make_recorder(stop_at=6), save_strategy="steps", save_steps=4, seed=7).train()
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 8, 16)}
    assert last_checkpoint(run) == str(run / "checkpoint-4")


def test_a_run_that_is_begun_anew_in_the_same_folder(
    run: Path, make_model: MakeModel, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "checkpoint-16")

    def killed(self: Trainer, folder: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(make_model(), save_strategy="steps", save_steps=8, seed=7).train()
    # The weights are the new ones, and the rest is the old one's.
    assert (run / "checkpoint-8" / "optimizer.pt").is_file()
    assert last_checkpoint(run) is None


def test_a_model_whose_buffers_are_bfloat16_is_resumed(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    config = {"progression": "global", "progression_end": 1.0}
    make_trainer(make_model(**config).bfloat16(), max_steps=12, save_strategy="steps", save_steps=4).train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    trainer = make_trainer(make_model(**config).bfloat16(), max_steps=12)
    trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert trainer.state.global_step == 12


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
