"""Arguments from YAML files and flags, and the table and file that a run ends with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from transformers import Trainer, TrainerState, TrainingArguments

import run_image_classification
from hf_stompp import BinarizationConfig
from hf_stompp.checkpoint import write_json
from hf_stompp.results import result_row
from recipe_flags import given_flags, parse_recipe, read_mapping
from recipe_utils import (
    bucket_by_length,
    check_shared,
    checkpoint_to_resume,
    files_of_checkpoints,
    format_table,
    is_finished,
    steps_of,
)
from run_glue import RecipeArguments

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))
TYPES = (RecipeArguments, BinarizationConfig, TrainingArguments)
IMAGE_TYPES = (run_image_classification.RecipeArguments, BinarizationConfig, TrainingArguments)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "task_name: rte\nlearning_rate: 1e-3\nclip: null\nactivations: false\nexclude: [a.*, b]\nmask_seed: 3\n"
        'lr_scheduler_kwargs: {"min_lr": 0.1}\nsave_strategy: "no"\n'
    )
    return path


def test_yaml_keys_are_flags(recipe: Path) -> None:
    own, config, args = parse_recipe([str(recipe)], TYPES)
    assert (own.task_name, own.max_seq_length) == ("rte", 128)
    assert (config.clip, config.activations, config.exclude, config.mask_seed) == (None, False, ["a.*", "b"], 3)
    assert (args.learning_rate, args.lr_scheduler_kwargs, args.save_strategy) == (1e-3, {"min_lr": 0.1}, "no")


def test_flags_override_the_file(recipe: Path) -> None:
    flags = "--learning_rate 5e-4 --clip 1.5 --activations --exclude c --task_name mrpc".split()
    own, config, args = parse_recipe([str(recipe), *flags], TYPES)
    assert (own.task_name, config.clip, config.activations, config.exclude) == ("mrpc", 1.5, True, ["c"])
    assert args.learning_rate == 5e-4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path: Path) -> None:
    is_text = path.name.startswith(("demo", "sst2", "cola_"))
    # Those for a GPU say bf16, which is refused where there is none.
    own, _, args = parse_recipe([str(path), "--use_cpu"], TYPES if is_text else IMAGE_TYPES)
    if is_text:
        assert own.task_name in ("sst2", "cola", "synthetic")
    else:
        run_image_classification.check(own, args)
        assert own.augmentation != "none" or own.model_type == "plain"
    assert args.do_train


def test_wrong_key_names_the_close_ones(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="'learning_rat' is not a flag of this recipe. Did you mean learning_rate"):
        parse_recipe([str(path)], TYPES)
    path.write_text("zzzzzz: 1\n")
    with pytest.raises(ValueError, match="'zzzzzz' is not a flag of this recipe. Run the script with --help"):
        parse_recipe([str(path)], TYPES)


def test_mapping_of_a_flag() -> None:
    values = {"depths": [1, 1], "layer_type": "basic"}
    assert read_mapping("config_overrides", json.dumps(values)) == values
    assert read_mapping("config_overrides", None) == {}
    for text in ("depths=1", "[1]"):
        with pytest.raises(
            ValueError, match=r"config_overrides: received '.*'; allowed: a JSON object, as in --config"
        ):
            read_mapping("config_overrides", text)


def test_wrong_value_is_refused_as_in_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: many\n")
    with pytest.raises(SystemExit):
        parse_recipe([str(path)], TYPES)
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file 'nothing.yaml'"):
        parse_recipe(["nothing.yaml"], TYPES)
    (tmp_path / "list.yml").write_text("- task_name\n")
    with pytest.raises(ValueError, match=r"list.yml: received \['task_name'\]; a recipe is a flat mapping"):
        parse_recipe([str(tmp_path / "list.yml")], TYPES)


def save_checkpoint(folder: Path, step: int, max_steps: int) -> str:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    TrainerState(global_step=step, max_steps=max_steps).save_to_json(str(checkpoint / "trainer_state.json"))
    save_file({"weight": torch.zeros(3)}, checkpoint / "model.safetensors")
    return str(checkpoint)


def test_checkpoint_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(value: str | None) -> str | None:
        return checkpoint_to_resume(TrainingArguments(str(tmp_path), resume_from_checkpoint=value))

    assert asked(None) is None
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: received True, but .* has no whole checkpoint"):
        asked("True")
    save_checkpoint(tmp_path, 2, max_steps=11)
    last = save_checkpoint(tmp_path, 10, max_steps=11)
    save_checkpoint(tmp_path, 12, max_steps=11)
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()  # the run was killed while it was written
    assert asked(None) == last
    assert f"Resuming from {last}" in capsys.readouterr().out
    assert asked("true") == last
    assert asked("False") is None
    assert asked("elsewhere") == "elsewhere"


def test_a_finished_run_is_not_resumed_unasked(tmp_path: Path) -> None:
    last = save_checkpoint(tmp_path, 11, max_steps=11)
    # It was killed before its results were written.
    assert checkpoint_to_resume(TrainingArguments(str(tmp_path))) == last
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a run that was finished at step 11. To start anew: another --output"):
        checkpoint_to_resume(TrainingArguments(str(tmp_path)))
    assert checkpoint_to_resume(TrainingArguments(str(tmp_path), resume_from_checkpoint="True")) == last


def test_what_is_left_to_train(tmp_path: Path) -> None:
    last = save_checkpoint(tmp_path, 11, max_steps=11)
    assert is_finished(last, 11)
    assert not is_finished(last, 12)
    with pytest.raises(ValueError, match=r"received a run of 10 steps, but .*checkpoint-11 is of step 11 already"):
        is_finished(last, 10)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({"max_steps": 7}, 7), ({"num_train_epochs": 2}, 6), ({"num_train_epochs": 0.5}, 2)],
    ids=str,
)
def test_the_steps_of_a_run_are_those_of_the_trainer(arguments: dict[str, Any], steps: int, tmp_path: Path) -> None:
    # Five batches, in threes of two, two and one.
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "report_to": []}
    args = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **settings, **arguments)
    trainer = Trainer(Line(), args, train_dataset=[{"x": float(i)} for i in range(9)])  # type: ignore[arg-type]
    assert steps_of(trainer) == steps
    trainer.train()
    assert trainer.state.global_step == steps


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.slope * x).mean()}


def test_processes_that_find_different_checkpoints_are_refused(tmp_path: Path) -> None:
    args, files = TrainingArguments(str(tmp_path)), ["checkpoint-2/model.safetensors"]
    check_shared(args, [(None, [])] * 2)
    check_shared(args, [("out/checkpoint-2", files)] * 2)
    with pytest.raises(
        ValueError, match=r"which find the checkpoints None, out/checkpoint-2\. Pass a folder that all share"
    ):
        check_shared(args, [(None, files), ("out/checkpoint-2", files)])


def test_machines_that_have_a_part_of_each_checkpoint_are_refused(tmp_path: Path) -> None:
    def seen(machine: str, asked: str | None) -> tuple[str | None, list[str]]:
        args = TrainingArguments(str(tmp_path / machine), do_train=True, resume_from_checkpoint=asked)
        return checkpoint_to_resume(args), files_of_checkpoints(args)

    for machine, files in {"a": ("model.safetensors", "rng_state_0.pth"), "b": ("rng_state_1.pth",)}.items():
        (tmp_path / machine / "checkpoint-8").mkdir(parents=True)
        for name in files:
            (tmp_path / machine / "checkpoint-8" / name).touch()
    args = TrainingArguments("out")
    with pytest.raises(
        ValueError, match=r"find the checkpoints None; not all see checkpoint-8/model\.safetensors\. Pass"
    ):
        check_shared(args, [seen("a", None), seen("b", None)])
    check_shared(args, [seen("a", "False"), seen("b", "False")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_is_given_makes_the_same_recipe_again(path: Path, tmp_path: Path) -> None:
    types = TYPES if path.name.startswith(("demo", "sst2", "cola_")) else IMAGE_TYPES
    flags = [
        "--use_cpu",
        "--no_activations",
        "--no-learn-activation-shift",
        "--logging_strategy=no",
        "--max-steps",
        "30",
    ]
    given = given_flags([str(path), *flags, "--exclude", "a.*", "b", "--warmup_st", "3", "--bf16=False"], types)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(given))
    assert given_flags([str(again)], types) == given
    expected = {"activations": False, "learn_activation_shift": False, "logging_strategy": "no", "max_steps": 30}
    assert given | expected | {"exclude": ["a.*", "b"], "warmup_steps": 3.0, "use_cpu": True} == given
    own, *_ = parse_recipe([str(again)], types)
    assert own == parse_recipe([str(path), "--use_cpu"], types)[0]


def test_result_row_and_table(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1234)
    metrics = {"eval_m_accuracy": 0.5, "eval_m_loss": 1.0, "eval_m_runtime": 1.0, "eval_n_accuracy": 0.25}
    more = {"eval_n_runtime": 2.0, "eval_n_samples_per_second": 9.0, "eval_model_preparation_time": 1.0, "epoch": 1.0}
    row = result_row("tiny", metrics | more, tmp_path, parts=("m", "n"))
    assert row == {"model": "tiny", "m_accuracy": 0.5, "n_accuracy": 0.25, "bytes": 1234, "eval_seconds": 3.0}
    assert format_table([row]).splitlines() == [
        "| model | m_accuracy | n_accuracy | bytes | eval_seconds |",
        "| :---- | ---------: | ---------: | ----: | -----------: |",
        "| tiny  |     0.5000 |     0.2500 | 1,234 |       3.0000 |",
    ]


def test_write_json_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("count", "batch_size"), [(5000, 8), (1003, 10), (7, 10)])
def test_buckets_have_little_padding_in_a_random_order(count: int, batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, count)
    rows = Dataset.from_dict({"id": range(count), "input_ids": [[0] * n for n in lengths]})
    ordered = bucket_by_length(rows, batch_size, seed=3)
    assert sorted(ordered["id"]) == list(range(count))
    assert ordered["id"] == bucket_by_length(rows, batch_size, seed=3)["id"]
    if count < batch_size:
        return
    assert ordered["id"] != bucket_by_length(rows, batch_size, seed=4)["id"]
    found = np.array([len(ids) for ids in ordered["input_ids"]])
    batches = found[: count // batch_size * batch_size].reshape(-1, batch_size)
    assert np.ptp(batches, axis=1).mean() < 6 < np.ptp(lengths[: batches.size].reshape(batches.shape), axis=1).mean()
    # Sorted runs would put longer batches before shorter ones (or the reverse) nearly always.
    falls = (np.diff(batches.mean(axis=1)) < 0).mean()
    assert 0.35 < falls < 0.65
