"""The GLUE recipe from its flags to its results, on a few sentences and a tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from transformers.utils import logging

import run_glue
from glue_tasks import TASKS
from hf_stompp import BinarizationConfig
from hf_stompp.patching import packed_layers
from hf_stompp.results import COLLAPSED
from recipe_flags import parse_recipe
from run_glue import RecipeArguments

QUICK = "--do_train --max_steps 4 --per_device_train_batch_size 4 --learning_rate 1e-3 --save_strategy no".split()
QUIET = "--disable_tqdm True --dataloader_pin_memory False".split()
BINARY = "--binarize --progression global --progression_end 1".split()


@pytest.fixture
def run(tmp_path: Path, tiny_bert: str) -> Callable[..., dict[str, Any]]:
    """Runs the recipe quickly on a task in a folder; a later flag overrides an earlier one."""

    def main(task: str, folder: Path, *flags: str, output: str = "out") -> dict[str, Any]:
        given = ["--task_name", task, "--dataset_dir", str(folder), "--model_name_or_path", tiny_bert]
        return run_glue.main([*given, "--output_dir", str(tmp_path / output), *QUICK, *QUIET, *flags])

    return main


def test_binarized_run(
    run: Callable[..., dict[str, Any]], sst2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run("sst2", sst2_folder, *BINARY, "--seed", "5", "--mask_seed", "6", "--dropout", "0.25")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {"seed": 5, "mask_seed": 6, "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "resumed_from": None}
    assert results.items() >= expected.items()
    assert results["train_seconds"] > 0
    assert results["binarization"]["progression"] == "global"
    assert results["recipe"]["task_name"] == "sst2"

    latent, packed = results["rows"]
    assert [row["model"].removesuffix(COLLAPSED) for row in results["rows"]] == ["latent fp32", "packed, reloaded"]
    assert latent["accuracy"] == packed["accuracy"]
    for row, folder in ((latent, tmp_path / "out"), (packed, tmp_path / "out" / "packed")):
        assert row["bytes"] == (folder / "model.safetensors").stat().st_size
    assert packed["bytes"] < latent["bytes"] / 4

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "packed")
    assert len(packed_layers(model)) == 12
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.25
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "packed")("soup")["input_ids"]

    card = ModelCard.load(tmp_path / "out" / "packed" / "README.md")
    (score,) = card.data.eval_results
    assert (score.dataset_type, score.dataset_config, score.dataset_split) == ("nyu-mll/glue", "sst2", "validation")
    assert (score.metric_value, score.metric_args) == (packed["accuracy"], {"seed": 5, "mask_seed": 6})
    assert "python recipes/run_glue.py --task_name sst2 --dataset_dir path/to/data" in card.content
    assert str(tmp_path) not in card.content

    printed = capsys.readouterr().out
    assert "parameters are 1-bit when frozen" in printed
    assert "| packed, reloaded" in printed


def test_a_model_that_says_the_same_of_everything_is_marked(
    run: Callable[..., dict[str, Any]], sst2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    (row,) = run("sst2", sst2_folder, "--learning_rate", "100", "--max_steps", "8")["rows"]
    assert row["model"] == "full precision (collapsed)" and "collapsed" not in row
    assert "rows: it has collapsed, and its score is that of a constant" in caplog.text


def test_full_precision_regression(run: Callable[..., dict[str, Any]], write_split: Callable[..., Path]) -> None:
    pairs = {"sentence1": ["good soup", "bad soup", "the fish"], "sentence2": ["great soup", "the bread", "the fish"]}
    write_split("stsb/train.parquet", **pairs, label=[4.0, 1.5, 5.0])
    folder = write_split("stsb/validation.parquet", **pairs, label=[4.0, 1.5, 5.0])
    results = run("stsb", folder)
    (row,) = results["rows"]
    assert list(row) == ["model", "pearson", "spearmanr", "bytes", "eval_seconds"]
    assert row["model"] == "full precision" and results["binarization"] is None and results["mask_seed"] is None


def test_mnli_is_scored_twice_and_predicted_in_order(
    run: Callable[..., dict[str, Any]], write_split: Callable[..., Path], tmp_path: Path
) -> None:
    premises = ["soup", "the soup was very good and so was the fish", "bad fish", "the waiter was great"]
    columns = {"premise": premises, "hypothesis": ["good", "the bread", "fish", "not"]}
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_split(f"mnli/{split}.parquet", **columns, label=[0, 1, 2, 1])
    for split in ("test_matched", "test_mismatched"):
        folder = write_split(f"mnli/{split}.parquet", **columns, label=[-1] * 4)
    grouped = "--do_predict --train_sampling_strategy group_by_length --per_device_eval_batch_size 2".split()
    (row,) = run("mnli", folder, *grouped)["rows"]
    assert list(row) == ["model", "matched_accuracy", "mismatched_accuracy", "bytes", "eval_seconds"]

    out = tmp_path / "out"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        logits = model(**tokenizer(*columns.values(), padding=True, return_tensors="pt")).logits
    expected = [f"{i}\t{model.config.id2label[int(code)]}" for i, code in enumerate(logits.argmax(-1))]
    for split in ("matched", "mismatched"):
        lines = (out / f"predictions_test_{split}.tsv").read_text().splitlines()
        assert lines == ["index\tprediction", *expected]


def test_resumed_run_ends_as_the_uninterrupted_one(
    run: Callable[..., dict[str, Any]], sst2_folder: Path, tmp_path: Path
) -> None:
    flags = (*BINARY, "--save_strategy", "steps", "--save_steps", "2")
    whole = run("sst2", sst2_folder, *flags, output="whole")
    # In the middle; and after the last checkpoint, before anything else was written.
    for step in (2, 4):
        last = tmp_path / f"cut{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / last.name, last)
        resumed = run("sst2", sst2_folder, *flags, output=last.parent.name)
        assert (whole["resumed_from"], resumed["resumed_from"]) == (None, str(last))
        assert resumed["steps"] == 4
        assert [row["accuracy"] for row in resumed["rows"]] == [row["accuracy"] for row in whole["rows"]]
        for name in ("model.safetensors", "packed/model.safetensors"):
            first, second = load_file(tmp_path / "whole" / name), load_file(last.parent / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def packed_bert(run: Callable[..., dict[str, Any]], sst2_folder: Path, tmp_path: Path) -> str:
    """The packed model of a run of the recipe."""
    run("sst2", sst2_folder, *BINARY, output="base")
    return str(tmp_path / "base" / "packed")


ADAPTERS = ["lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "norms_and_biases"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_on_a_packed_model(
    adapter: str, run: Callable[..., dict[str, Any]], sst2_folder: Path, packed_bert: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    given = {"lora": '{"r": 4}', "ia3": "{}", "norms_and_biases": "{}", "p_tuning": '{"encoder_hidden_size": 8}'}
    config = given.get(adapter, '{"num_virtual_tokens": 3}')
    flags = ["--model_name_or_path", packed_bert, "--adapter", adapter, "--adapter_config", config]
    results = run("sst2", sst2_folder, *flags, "--learning_rate", "0.05")
    alone, both = results["rows"]
    names = [row["model"].removesuffix(COLLAPSED) for row in (alone, both)]
    assert names == ["base alone, reloaded", "base and adapter, reloaded"]
    base_bytes = (Path(packed_bert) / "model.safetensors").stat().st_size
    assert (alone["bytes"], both["bytes"]) == (base_bytes, base_bytes + results["adapter"]["bytes"])
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert results["adapter"]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert not any(tensor.dtype == torch.uint8 for tensor in weights.values())
    kinds = {name.rpartition(".")[2] for name in weights if "encoder.layer" in name}
    if adapter == "norms_and_biases":
        norms_and_biases = [name for name in weights if "LayerNorm" in name or name.endswith("bias")]
        assert kinds == {"weight", "bias"} and len(norms_and_biases) > 20 and not any("lora_" in n for n in weights)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| base and adapter, reloaded" in text and str(tmp_path) not in text and "mask seed" not in text


@pytest.mark.parametrize("binary", [False, True])
def test_a_run_of_an_adapter_is_resumed(
    binary: bool, run: Callable[..., dict[str, Any]], sst2_folder: Path, packed_bert: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    flags = ["--adapter", "lora", "--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "0.05"]
    flags += BINARY if binary else ["--model_name_or_path", packed_bert]
    whole = run("sst2", sst2_folder, *flags, output="whole")
    names = ["adapter_model.safetensors"]
    if binary:
        names = ["latent_base/model.safetensors", "packed/model.safetensors", "adapter/adapter_model.safetensors"]
        latent, _, packed = whole["rows"]
        assert latent["model"].startswith("latent fp32, with its adapter")
        assert latent["accuracy"] == packed["accuracy"]
        assert whole["adapter"]["base"] == str(tmp_path / "whole" / "packed")
    for step in (2, 4):
        last = tmp_path / f"cut{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / last.name, last)
        resumed = run("sst2", sst2_folder, *flags, output=last.parent.name)
        assert resumed["resumed_from"] == str(last) and resumed["steps"] == 4
        for name in names:
            first, second = load_file(tmp_path / "whole" / name), load_file(last.parent / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


def test_wrong_settings_of_an_adapter_are_named(
    run: Callable[..., dict[str, Any]], sst2_folder: Path, packed_bert: str
) -> None:
    pytest.importorskip("peft")
    flags = ["--model_name_or_path", packed_bert, "--adapter", "lora", "--adapter_config"]
    with pytest.raises(ValueError, match="adapter_config: lora has no field 'rank'; allowed: .*, r,"):
        run("sst2", sst2_folder, *flags, '{"rank": 4}')
    with pytest.raises(ValueError, match="adapter_config: received 'r=4'; allowed: a JSON object"):
        run("sst2", sst2_folder, *flags, "r=4")
    with pytest.raises(ValueError, match=r"LoraConfig.use_dora is True"):
        run("sst2", sst2_folder, *flags, '{"use_dora": true}')
    norms = [*flags[:2], "--adapter", "norms_and_biases", "--adapter_config", '{"r": 4}']
    with pytest.raises(ValueError, match=r"norms_and_biases has no field 'r'; .*pass --adapter_config '{}'"):
        run("sst2", sst2_folder, *norms)
    with pytest.raises(ValueError, match="is packed. Drop the flag to train an adapter on it"):
        run("sst2", sst2_folder, *flags[:4], *BINARY)
    with pytest.raises(ValueError, match="is packed, and bits are not trained. Train an adapter"):
        run("sst2", sst2_folder, *flags[:2])
    with pytest.raises(ValueError, match="is latent. Take its packed folder"):
        run("sst2", sst2_folder, "--model_name_or_path", str(Path(packed_bert).parent), *flags[2:4])


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("sst2", "--hidden_weight 1", "hidden_weight: received 1.0 without a teacher"),
        ("sst2", "--join_texts 2", "join_texts: received 2 without a teacher"),
        ("sst2", "--teacher any --join_texts 2 --labels_weight 1", "join_texts: received 2 with labels_weight=1.0"),
        ("mrpc", "--teacher any --join_texts 2", "join_texts: received 2 for mrpc, which has two texts"),
        ("sst2", "--teacher any --join_texts 0", "join_texts: received 0; allowed: 1"),
        ("mrpc", "--replace_words 0.3", "replace_words: received 0.3 without a teacher"),
        (
            "mrpc",
            "--teacher any --replace_words 0.3 --labels_weight 1",
            "replace_words: received 0.3 with labels_weight",
        ),
        ("mrpc", "--teacher any --replace_words -0.1", "replace_words: received -0.1; allowed: a probability"),
        ("mrpc", "--teacher any --replace_words 1.5", "replace_words: received 1.5; allowed: a probability"),
        ("mrpc", "--teacher any --replace_words nan", "replace_words: received nan; allowed: a probability"),
        ("sst2", "--teacher any --text_copies 0", "text_copies: received 0; allowed: 1, the training set itself"),
        ("sst2", "--teacher any --text_copies 2", "text_copies: received 2 without join_texts or replace_words"),
    ],
)
def test_wrong_settings_of_a_teacher_are_named(
    task: str, flags: str, message: str, run: Callable[..., dict[str, Any]], sst2_folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(task, sst2_folder, *flags.split())


def test_an_adapter_on_full_precision(
    run: Callable[..., dict[str, Any]], sst2_folder: Path, tiny_bert: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    results = run("sst2", sst2_folder, "--adapter", "lora")
    assert len(results["rows"]) == 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(tiny_bert).resolve())
    with pytest.raises(ValueError, match="holds a run that was finished at step 4") as refused:
        run("sst2", sst2_folder, "--adapter", "lora", "--save_strategy", "steps", "--save_steps", "4", output="again")
        run("sst2", sst2_folder, "--adapter", "lora", "--save_strategy", "steps", "--save_steps", "4", output="again")
    assert "score it again" not in str(refused.value)


@pytest.mark.parametrize("cached", [False, True])
def test_a_student_of_a_teacher(
    cached: bool, run: Callable[..., dict[str, Any]], sst2_folder: Path, tmp_path: Path
) -> None:
    run("sst2", sst2_folder, output="teacher")
    flags = ["--teacher", str(tmp_path / "teacher"), *(["--cache_teacher"] if cached else ["--hidden_weight", "1"])]
    results = run("sst2", sst2_folder, *BINARY, *flags)
    assert [row["model"].removesuffix(COLLAPSED) for row in results["rows"]] == ["latent fp32", "packed, reloaded"]
    assert results["recipe"]["teacher"] == str(tmp_path / "teacher")
    if cached:
        with pytest.raises(ValueError, match="cache_teacher: received True with .*hidden_weight=1.0"):
            run("sst2", sst2_folder, *BINARY, *flags, "--hidden_weight", "1")


def test_a_teacher_judges_joined_texts(sst2_folder: Path, tiny_bert: str, tmp_path: Path) -> None:
    given = ["--task_name", "sst2", "--dataset_dir", str(sst2_folder), "--model_name_or_path", tiny_bert]
    words = {}
    for most in (1, 3):
        flags = [*given, "--output_dir", str(tmp_path), "--teacher", "any", "--join_texts", str(most), "--seed", "3"]
        recipe, _, args = parse_recipe(flags, (RecipeArguments, BinarizationConfig, TrainingArguments))
        data = run_glue.prepare(recipe, args).data
        words[most] = [[len(ids) - 2 for ids in data[split]["input_ids"]] for split in ("train", "validation")]
    assert set(words[1][0]) == {4} and set(words[3][0]) == {4, 8, 12}
    assert words[1][1] == words[3][1]  # what is scored remains as it is


def test_a_teacher_judges_texts_with_other_words(
    run: Callable[..., dict[str, Any]], write_split: Callable[..., Path], tiny_bert: str, tmp_path: Path
) -> None:
    pairs = {"sentence1": ["the soup was good", "the fish was bad"], "sentence2": ["a waiter was great"] * 2}
    folder = write_split("mrpc/train.parquet", **{name: 4 * texts for name, texts in pairs.items()}, label=[0, 1] * 4)
    write_split("mrpc/validation.parquet", **pairs, label=[0, 1])
    run("mrpc", folder, output="teacher")
    teacher = str(tmp_path / "teacher")
    given = ["--task_name", "mrpc", "--dataset_dir", str(folder), "--model_name_or_path", tiny_bert]
    texts = {}
    for share in ("0", "1"):
        flags = [*given, "--output_dir", str(tmp_path), "--teacher", teacher, "--replace_words", share]
        recipe, _, args = parse_recipe(flags, (RecipeArguments, BinarizationConfig, TrainingArguments))
        data = run_glue.prepare(recipe, args).data
        texts[share] = [data[split]["input_ids"] for split in ("train", "validation")]
    assert texts["0"][1] == texts["1"][1]  # what is scored remains as it is
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    kept = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    for before, after in zip(texts["0"][0], texts["1"][0], strict=True):
        assert all((a == b) == (a in kept) for a, b in zip(before, after, strict=True))
        assert sum(a not in kept for a in before) >= 6
    more = ["--output_dir", str(tmp_path), "--teacher", teacher, "--replace_words", "1", "--text_copies", "3"]
    recipe, _, args = parse_recipe([*given, *more], (RecipeArguments, BinarizationConfig, TrainingArguments))
    copies = run_glue.prepare(recipe, args).data["train"]["input_ids"]
    assert len(copies) == 24 and copies[:8] != copies[8:16] != copies[16:]
    results = run("mrpc", folder, *BINARY, "--teacher", teacher, "--replace_words", "0.5", "--text_copies", "2")
    assert results["recipe"]["replace_words"] == 0.5


def test_a_second_stage_has_rules_of_its_own(
    run: Callable[..., dict[str, Any]], sst2_folder: Path, tmp_path: Path
) -> None:
    first = run("sst2", sst2_folder, *BINARY, "--no_activations", output="first")
    second = run("sst2", sst2_folder, *BINARY, "--model_name_or_path", str(tmp_path / "first"), output="second")
    assert [each["binarization"]["activations"] for each in (first, second)] == [False, True]
    one, other = (load_file(tmp_path / stage / "model.safetensors") for stage in ("first", "second"))
    scales = [name for name in other if name.endswith("activation_scale")]
    assert len(scales) == 12 and not set(scales) & set(one)
    assert all(other[name.replace("activation_scale", "calibrated")] for name in scales)
    assert len(packed_layers(AutoModelForSequenceClassification.from_pretrained(tmp_path / "second" / "packed"))) == 12
    # It began with the weights of the first one: four steps of 1e-3 at most away from them.
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert 0 < (one[name] - other[name]).abs().max() < 5e-3


def test_synthetic_demo_ends_with_a_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--max_train_samples 32 --max_eval_samples 8".split()
    run_glue.main(["--task_name", "synthetic", *QUICK, *QUIET, *BINARY, *sizes, "--output_dir", str(tmp_path)])
    assert "soup was superb . [{'label': 'food" in capsys.readouterr().out.splitlines()[-1]


def test_wrong_input_stops_before_anything_is_loaded(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"received 'sst3'; allowed: .*synthetic. Did you mean 'sst2'"):
        run("sst3", tmp_path)
    with pytest.raises(FileNotFoundError, match="no split 'train'; it holds no parquet file at all"):
        run("sst2", tmp_path)
    with pytest.raises(ValueError, match="dataset_dir: received .* synthetic has no files"):
        run("synthetic", tmp_path)
    with pytest.raises(ValueError, match="load_best_model_at_end: received True; allowed: False"):
        run("sst2", tmp_path, *"--load_best_model_at_end --eval_strategy steps --save_strategy steps".split())
    with pytest.raises(ValueError, match="model_name_or_path: received None; sst2 needs a Hub id or a folder"):
        run_glue.main(["--task_name", "sst2", "--output_dir", str(tmp_path)])


def test_dropout_of_a_model_without_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    with pytest.raises(ValueError, match="dropout: received 0.0, but a distilbert has no hidden_dropout_prob"):
        run_glue.load_model(str(tmp_path), TASKS["sst2"], RecipeArguments(dropout=0.0), BinarizationConfig())
