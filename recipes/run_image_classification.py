r"""Train an image classifier, in 1 bit with `--binarize`, and report the trained model and its packed copy.

A minute on a CPU, nothing to download (scikit-learn's handwritten digits and a small ResNet from scratch):

    python recipes/run_image_classification.py recipes/configs/digits.yaml

CIFAR-10 from the Hub, W1A1 by StoMPP; every YAML key is a flag, and a flag overrides the file:

    python recipes/run_image_classification.py recipes/configs/cifar10_resnet18_small.yaml --output_dir out/cifar10
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_stompp import BinarizationConfig, StomppCallback, binarize, summary
from image_data import Images, ImageTask, Transforms, load_task
from recipe_flags import parse_recipe, read_mapping
from recipe_utils import CommonArguments, describe, metrics_of, refuse_best_checkpoint, report, score, train


@dataclass
class RecipeArguments(CommonArguments):
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, as uoft-cs/cifar10, also of what is in dataset_dir; or digits."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Which of the data set's configs."})
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder of parquet files, or of train/<class>/*.png …; without it the Hub."}
    )
    eval_split: str = field(default="test", metadata={"help": "The split to score on; of ImageNet validation."})
    image_column: str | None = field(default=None, metadata={"help": "Without it, the only one of images."})
    label_column: str | None = field(default=None, metadata={"help": "Without it, the only one of classes."})
    config_name: str | None = field(
        default=None, metadata={"help": "From scratch: Hub id or folder of a config.json, as microsoft/resnet-18."}
    )
    model_type: str | None = field(default=None, metadata={"help": "From scratch: an architecture, as resnet."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the model's config: JSON; in YAML a mapping."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of what the model sees; without it the model's own, or that of the first image."
        },
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Of red, green, blue in [0, 1]; without it the pretrained model's, or 0.5."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "As image_mean."})
    augmentation: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = field(
        default="none",
        metadata={
            "help": "crop: move by up to an eighth of the side; flip: mirror half; resized_crop: a random part, "
            "enlarged, and of what is evaluated the centre."
        },
    )
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a batch in the running statistics; without it the model's own (MobileNets: 0.997)."
        },
    )
    channels_last: bool = field(default=False, metadata={"help": "Memory format of the model; often faster."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what it writes to `results.json`."""
    argv = sys.argv[1:] if argv is None else argv
    recipe, config, args = parse_recipe(argv, (RecipeArguments, BinarizationConfig, TrainingArguments))
    check(recipe, args)
    set_seed(args.seed)
    binarization = config if recipe.binarize else None
    with args.main_process_first(desc="data"):
        task = load_task(
            recipe.dataset_name,
            recipe.dataset_config,
            recipe.dataset_dir,
            recipe.eval_split,
            (recipe.image_column, recipe.label_column),
            (recipe.max_train_samples, recipe.max_eval_samples),
        )
        model_config = load_config(recipe, task.labels)
        transforms = make_transforms(recipe, task, model_config)
        train_data = Images(task.train, task.columns, transforms.train, args.seed)
        eval_data = Images(task.evaluation, task.columns, transforms.evaluate)
    trainer = Trainer(
        load_model(recipe, model_config, binarization),
        args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=transforms.processor(),
        compute_metrics=metrics_of(recipe, "accuracy"),
        callbacks=[StomppCallback()] if recipe.binarize else None,
    )
    if recipe.binarize and trainer.is_world_process_zero():
        print(summary(trainer.model))
    training = train(trainer, recipe.matmul_precision)
    rows, folder = score(trainer, binarization, AutoModelForImageClassification)
    # What `hf_stompp.verify` needs to score the model again; all else is in its image processor.
    image_column, label_column = task.columns
    scoring = {"columns": [image_column], "label_column": label_column}
    results = {**describe(recipe, binarization, args), **scoring, **training, "rows": rows}
    if trainer.is_world_process_zero():
        command = ["recipes/run_image_classification.py", *argv]
        report(results, Path(args.output_dir), recipe.dataset_name, command)
        first = task.evaluation[0]
        predicted = pipeline("image-classification", model=str(folder))(first[image_column], top_k=1)
        print(f"The first image, of class {task.labels[first[label_column]]!r}, is classified as {predicted}")
    return results


def check(recipe: RecipeArguments, args: TrainingArguments) -> None:
    """Refuse what contradicts itself before anything is loaded."""
    sources = ("model_name_or_path", "config_name", "model_type")
    given = [f"{name} {getattr(recipe, name)}" for name in sources if getattr(recipe, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"the model: received {' and '.join(given) or 'none'}; allowed: one of --model_name_or_path (pretrained), "
            "--config_name or --model_type (from scratch). Pass one, as in --model_type resnet."
        )
    if recipe.dataset_name is None and recipe.dataset_dir is None:
        raise ValueError(
            "dataset_name: received None; allowed: a Hub id, as uoft-cs/cifar10, or digits. Pass one, or a folder as "
            "--dataset_dir."
        )
    if recipe.image_size is not None and recipe.image_size < 1:
        raise ValueError(f"image_size: received {recipe.image_size}; allowed: 1 or more, as in --image_size 64.")
    if recipe.batch_norm_momentum is not None and not 0 < recipe.batch_norm_momentum <= 1:
        raise ValueError(
            f"batch_norm_momentum: received {recipe.batch_norm_momentum}; allowed: above 0, up to 1, as in "
            "--batch_norm_momentum 0.1."
        )
    for name in ("image_mean", "image_std"):
        values = getattr(recipe, name)
        if values is not None and len(values) != 3:
            raise ValueError(f"{name}: received {values}; allowed: 3 numbers, of red, green and blue.")
    refuse_best_checkpoint(args)


def make_transforms(recipe: RecipeArguments, task: ImageTask, config: PreTrainedConfig) -> Transforms:
    """As the flags say; what they leave open is the model's, then that of the images."""
    mean, std = recipe.image_mean, recipe.image_std
    if recipe.model_name_or_path is not None and None in (mean, std):
        found = pretrained_statistics(recipe.model_name_or_path, config)
        mean, std = mean or found[0], std or found[1]
    made_for = getattr(config, "image_size", None)  # a ResNet takes any size, a ViT the one that it was made for
    made_for = made_for if isinstance(made_for, int) else None
    size = recipe.image_size or made_for or task.train[0][task.columns[0]].height
    return Transforms(size, mean or [0.5] * 3, std or [0.5] * 3, recipe.augmentation)


def pretrained_statistics(source: str, config: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue that a pretrained model's image processor takes off."""
    if config.model_type == "timm_wrapper":  # whose image processor has no such fields
        return config.pretrained_cfg["mean"], config.pretrained_cfg["std"]
    settings = AutoImageProcessor.from_pretrained(source).to_dict()
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize") or settings.get("do_flip_channel_order") or mean is None or std is None:
        raise ValueError(
            f"model_name_or_path: the image processor of {source!r} does not normalize red, green and blue as "
            "(x - mean) / std, as this recipe does. Pass --image_mean and --image_std to train it on such inputs."
        )
    return list(mean), list(std)


def load_model(
    recipe: RecipeArguments, config: PreTrainedConfig, binarization: BinarizationConfig | None
) -> PreTrainedModel:
    """A pretrained model with a new head unless its classes are those of the config, or one from scratch."""
    if recipe.model_name_or_path is not None:
        options = {"quantization_config": binarization} if binarization else {}
        model = AutoModelForImageClassification.from_pretrained(
            recipe.model_name_or_path, config=config, ignore_mismatched_sizes=True, **options
        )
    else:
        model = AutoModelForImageClassification.from_config(config)
        if binarization:
            model = binarize(model, binarization)
    if recipe.batch_norm_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = recipe.batch_norm_momentum
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def load_config(recipe: RecipeArguments, labels: Sequence[str]) -> PreTrainedConfig:
    """The model's config with the overrides, and the classes of the data."""
    make = AutoConfig.for_model if recipe.model_type else AutoConfig.from_pretrained
    source = recipe.model_type or recipe.config_name or recipe.model_name_or_path
    fields = read_mapping("config_overrides", recipe.config_overrides)
    known = make(source)
    for name in fields:
        if not hasattr(known, name):
            close = difflib.get_close_matches(name, known.to_dict(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"config_overrides: received the field {name!r}; allowed: those of a {known.model_type}.{hint}"
            )
    names = dict(enumerate(labels))
    return make(source, **fields, id2label=names, label2id={label: code for code, label in names.items()})


if __name__ == "__main__":
    main()
