"""The image recipe from its flags to its results, on a few images and a tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL.Image import fromarray
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

import run_image_classification as recipe
from hf_stompp import BinarizationConfig, model_card, verify
from hf_stompp.layers import PackedConv2d
from image_data import load_task
from recipe_flags import parse_recipe

CONFIGS = Path(recipe.__file__).parent / "configs"
TINY = ["--model_type", "resnet", "--config_overrides"]
TINY.append('{"layer_type": "basic", "depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}')
QUICK = (
    "--do_train --max_steps 4 --per_device_train_batch_size 8 --learning_rate 1e-3 --save_strategy no "
    "--max_train_samples 24 --max_eval_samples 16 --disable_tqdm True --dataloader_pin_memory False"
).split()
DIGITS = "--dataset_name digits --image_size 16 --augmentation crop".split()
BINARY = "--binarize --progression global --progression_end 1".split()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the recipe quickly; a later flag overrides an earlier one."""

    def main(*flags: str, output: str = "out") -> dict[str, Any]:
        return recipe.main([*QUICK, *flags, "--output_dir", str(tmp_path / output)])

    return main


def parse(*flags: str) -> recipe.RecipeArguments:
    return parse_recipe(flags, (recipe.RecipeArguments, BinarizationConfig, TrainingArguments))[0]


def test_binarized_run(run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(*DIGITS, *TINY, *BINARY, "--seed", "5", "--mask_seed", "6")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {"seed": 5, "mask_seed": 6, "steps": 4, "columns": ["image"], "label_column": "label"}
    assert results.items() >= expected.items()
    assert results["recipe"]["dataset_name"] == "digits" and results["recipe"]["eval_split"] == "test"
    latent, packed = results["rows"]
    assert (latent["model"], packed["model"]) == ("latent fp32", "packed, reloaded")
    assert latent["accuracy"] == packed["accuracy"]
    assert packed["bytes"] < latent["bytes"]

    folder = tmp_path / "out" / "packed"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert sum(isinstance(module, PackedConv2d) for module in model.modules()) == 4
    assert model.config.id2label == {code: str(code) for code in range(10)}
    card = ModelCard.load(folder / "README.md")
    (score,) = card.data.eval_results
    assert (score.dataset_type, score.dataset_split, score.metric_value) == ("digits", "test", packed["accuracy"])
    assert "python recipes/run_image_classification.py --do_train" in card.content
    assert str(tmp_path) not in card.content
    printed = capsys.readouterr().out
    assert "| packed, reloaded |" in printed
    assert "The first image, of class '" in printed.splitlines()[-1]


def test_the_pipeline_scores_what_the_recipe_did(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The image processor that is saved is the evaluation's."""
    learning = "--max_steps 60 --max_train_samples 240 --max_eval_samples 40 --learning_rate 1e-2".split()
    (row,) = run(*DIGITS, *TINY, *learning)["rows"]
    rows = load_task("digits", limits=(1, 40)).evaluation
    predicted = pipeline("image-classification", model=str(tmp_path / "out"))(rows["image"][:], top_k=1)
    right = [answer[0]["label"] == str(label) for answer, label in zip(predicted, rows["label"], strict=True)]
    assert row["model"] == "full precision"
    assert sum(right) / 40 == pytest.approx(row["accuracy"])
    assert row["accuracy"] > 0.3


def test_resumed_run_ends_as_the_uninterrupted_one(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    # Five steps of an epoch of three: what was interrupted is in the middle of the second one.
    flags = (*DIGITS, *TINY, *BINARY, "--augmentation", "crop_flip", "--max_steps", "5")
    saving = ("--save_strategy", "steps", "--save_steps", "4")
    whole = run(*flags, *saving, output="whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    resumed = run(*flags, *saving, output="cut")
    assert (whole["resumed_from"], resumed["resumed_from"]) == (None, str(tmp_path / "cut" / "checkpoint-4"))
    for name in ("model.safetensors", "packed/model.safetensors"):
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_cifar10(shared_data: Path, tmp_path: Path) -> None:
    flags = ["--dataset_dir", str(shared_data / "cifar10"), *BINARY, "--channels_last", "--max_steps", "3"]
    small = str(CONFIGS / "cifar10_resnet18_small.yaml")
    results = recipe.main([small, *QUICK, *flags, "--output_dir", str(tmp_path / "out")])
    assert results["columns"] == ["img"]
    card = ModelCard.load(tmp_path / "out" / "packed" / "README.md")
    assert card.data.datasets == "uoft-cs/cifar10"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "packed")
    assert list(processor.image_mean) == [0.4914, 0.4822, 0.4465]
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label[9] == "truck"


def test_pretrained_backbone_gets_a_new_head(
    run: Callable[..., dict[str, Any]], shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "weights" / "mobilenet_v2_1.0_224_imagenet"
    flags = ["--model_name_or_path", str(source), "--image_size", "32", "--image_std", "0.2", "0.3", "0.4"]
    run("--dataset_name", "digits", *flags, "--max_steps", "1", "--learning_rate", "0")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.classifier.out_features == 10
    trained, pretrained = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    name = "mobilenet_v2.conv_1x1.convolution.weight"
    assert torch.equal(trained[name], pretrained[name])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5, 0.5, 0.5], [0.2, 0.3, 0.4])


def test_config_by_name_with_overrides(tmp_path: Path) -> None:
    parsed = parse(*TINY)
    config = recipe.load_config(parsed, ["cat", "dog"])
    assert (config.hidden_sizes, config.stage_names) == ([8, 16], ["stem", "stage1", "stage2"])
    assert (config.id2label, config.label2id, config.num_labels) == ({0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}, 2)
    config.save_pretrained(tmp_path)
    named = recipe.load_config(
        parse("--config_name", str(tmp_path), "--config_overrides", '{"depths": [2, 2]}'), ["a"]
    )
    assert (named.hidden_sizes, named.depths, named.num_labels) == ([8, 16], [2, 2], 1)


def test_wrong_input_stops_before_anything_is_loaded(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model: received none; allowed: one of --model_name_or_path"):
        run(*DIGITS)
    with pytest.raises(ValueError, match="the model: received config_name a and model_type resnet; allowed: one of"):
        run(*DIGITS, *TINY, "--config_name", "a")
    with pytest.raises(ValueError, match="dataset_name: received None; allowed: a Hub id, .* or digits. Pass one"):
        run(*TINY)
    with pytest.raises(ValueError, match=r"image_mean: received \[0.5\]; allowed: 3 numbers"):
        run(*DIGITS, *TINY, "--image_mean", "0.5")
    with pytest.raises(ValueError, match="image_size: received 0; allowed: 1 or more"):
        run(*DIGITS, *TINY, "--image_size", "0")
    with pytest.raises(ValueError, match="the field 'depth'; allowed: those of a resnet. Did you mean 'depths'"):
        run(*DIGITS, "--model_type", "resnet", "--config_overrides", '{"depth": [1]}')
    with pytest.raises(ValueError, match="load_best_model_at_end: received True; allowed: False"):
        run(*DIGITS, *TINY, *"--load_best_model_at_end --eval_strategy steps --save_strategy steps".split())


@pytest.mark.slow
def test_the_demo_learns_the_digits(tmp_path: Path) -> None:
    latent, packed = recipe.main([str(CONFIGS / "digits.yaml"), "--output_dir", str(tmp_path)])["rows"]
    assert latent["accuracy"] > 0.97
    assert packed["accuracy"] == pytest.approx(latent["accuracy"], abs=0.003)
    assert packed["bytes"] * 5 < latent["bytes"]


def test_a_model_of_an_image_folder_is_scored_again_from_its_card(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """By the recipe's own card, and by one that is written of its results."""
    for split in ("train", "held_out"):
        for row in range(12):
            folder = tmp_path / "images" / split / "dark" if row % 2 else tmp_path / "images" / split / "light"
            folder.mkdir(parents=True, exist_ok=True)
            fromarray(np.full((16, 16, 3), 20 * row, dtype=np.uint8)).save(folder / f"{row}.png")
    data = ["--dataset_dir", str(tmp_path / "images"), "--eval_split", "held_out"]
    accuracy = run(*data, *TINY, *BINARY)["rows"][-1]["accuracy"]
    packed, metric = tmp_path / "out" / "packed", Path(recipe.__file__).parent / "metrics" / "accuracy"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for card in (None, model_card(packed, results=results)):
        if card is not None:
            card.save(packed / "README.md")
        scored = verify(packed, dataset_dir=tmp_path / "images", metric=str(metric)).checks[-1]
        assert (scored.name, scored.status) == ("accuracy, held_out", "passed")
        assert f"{accuracy:.4f} on" in scored.message
    with pytest.raises(FileNotFoundError, match=r"no split 'test'; it holds held_out/, train/\. Add test\.parquet"):
        run(*data, *TINY, "--eval_split", "test", output="other")


def test_an_unknown_flag_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match="--surogate is not a flag of this recipe. Did you mean surrogate"):
        parse(*DIGITS, "--surogate", "none")


def test_the_momentum_of_batch_norms_can_be_set(run: Callable[..., dict[str, Any]]) -> None:
    arguments = parse(*DIGITS, *TINY, "--batch_norm_momentum", "0.25")
    model = recipe.load_model(arguments, recipe.load_config(arguments, ["0", "1"]), None)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and {norm.momentum for norm in norms} == {0.25}
    with pytest.raises(ValueError, match=r"batch_norm_momentum: received 1.5; allowed: above 0, up to 1"):
        run(*DIGITS, *TINY, "--batch_norm_momentum", "1.5")


def test_a_processor_that_does_something_else_is_refused(tmp_path: Path) -> None:
    config = ResNetConfig(image_size=32)
    config.save_pretrained(tmp_path)
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    assert recipe.pretrained_statistics(str(tmp_path), config) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    ViTImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="does not normalize red, green and blue .* Pass --image_mean and --image_std"
    ):
        recipe.pretrained_statistics(str(tmp_path), config)


@pytest.mark.parametrize(
    ("model", "size"), [(["--model_type", "vit", "--config_overrides", '{"image_size": 24}'], 24), (TINY, 8)]
)
def test_a_model_that_was_made_for_a_size_gets_it(model: list[str], size: int) -> None:
    arguments, task = parse("--dataset_name", "digits", *model), load_task("digits")
    assert recipe.make_transforms(arguments, task, recipe.load_config(arguments, task.labels)).size == size
