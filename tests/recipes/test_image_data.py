"""Loading images from folders, every way in which they can be wrong, and what is done to a batch of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL.Image import fromarray

import image_data
from image_data import Images, Transforms, load_task, random_crop, random_flip, random_resized_crop, to_tensor

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
FEATURES = Features({"img": Image(), "label": ClassLabel(names=list(COLOURS))})
STATISTICS = ([0.5, 0.4, 0.3], [0.25, 0.2, 0.1])


def picture(label: int = 0, size: tuple[int, int] = (6, 8)) -> fromarray:
    """A noisy image of `size`, height and width, in the class's colour."""
    noise = np.random.default_rng(0).integers(0, 100, (*size, 3))
    colour = np.array(list(COLOURS.values())[label])
    return fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes `<split>-00000-of-00001.parquet` of images with these labels: the folder of all."""

    def call(split: str, labels: list[int | None], features: Features = FEATURES, **columns: list) -> Path:
        rows = {"img": [picture(label or 0) for label in labels], "label": labels} | columns
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        return tmp_path

    return call


# --- loading --------------------------------------------------------------------------------------------------------


def test_parquet_folder(write: Callable[..., Path]) -> None:
    write("train", [0, 1, 2])
    task = load_task("a/b", dataset_dir=write("test", [2, 1]), limits=(2, None))
    assert (len(task.train), len(task.evaluation)) == (2, 2)
    assert task.columns == ("img", "label") and task.labels == ["red", "green", "blue"]
    with pytest.raises(ValueError, match="'train': received 0; allowed: 1 or more"):
        load_task("a/b", dataset_dir=write("test", [2]), limits=(0, None))


def test_image_folder(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for label, name in enumerate(COLOURS):
            (tmp_path / split / name).mkdir(parents=True)
            picture(label).save(tmp_path / split / name / "1.png")
    task = load_task(None, dataset_dir=tmp_path, eval_split="validation")
    assert task.labels == sorted(COLOURS) and len(task.train) == len(task.evaluation) == 3
    assert to_tensor(task.train[0]["image"])[2].float().mean() > 200  # blue comes first
    with pytest.raises(FileNotFoundError, match="has no split 'test'"):
        load_task(None, dataset_dir=tmp_path)


def test_digits_are_split_once_and_for_all() -> None:
    task = load_task("digits")
    assert (len(task.train), len(task.evaluation)) == (1437, 360)
    counts = np.bincount(task.evaluation["label"][:])
    assert counts.min() >= 35 and counts.max() <= 37
    seen = {image.tobytes() for image in task.train["image"]}
    assert not seen & {image.tobytes() for image in task.evaluation["image"]}
    again = load_task("digits").evaluation
    assert again["label"][:5] == task.evaluation["label"][:5]
    with pytest.raises(ValueError, match="eval_split: received 'validation', but digits has"):
        load_task("digits", eval_split="validation")


def test_columns_are_found_or_asked_for(write: Callable[..., Path]) -> None:
    features = Features({**FEATURES, "coarse": ClassLabel(names=["warm", "cold"]), "id": Value("int64")})
    for split in ("train", "test"):
        folder = write(split, [0, 2], features, coarse=[0, 1], id=[7, 8])
    with pytest.raises(
        ValueError, match=r"label_column: received None; .* ClassLabel .* has img \(Image\), .* Pass --"
    ):
        load_task("a/b", dataset_dir=folder)
    task = load_task("a/b", dataset_dir=folder, columns=(None, "coarse"))
    assert task.labels == ["warm", "cold"] and task.train.column_names == ["img", "coarse"]
    with pytest.raises(ValueError, match="image_column: received 'id'; allowed: one column of type Image"):
        load_task("a/b", dataset_dir=folder, columns=("id", "coarse"))


def test_wrong_rows(write: Callable[..., Path]) -> None:
    write("train", [0, 1])
    with pytest.raises(ValueError, match="'label' of the split 'test': received None; allowed: 0 to 2"):
        load_task("a/b", dataset_dir=write("test", [0, None]))
    with pytest.raises(ValueError, match="received -1; .* -1 marks the hidden labels .* another --eval_split"):
        load_task("a/b", dataset_dir=write("test", [0, -1]))
    with pytest.raises(ValueError, match="'img' of the split 'test': 1 rows have no image. Drop them"):
        load_task("a/b", dataset_dir=write("test", [0, 1], img=[picture(), None]))
    other = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    with pytest.raises(ValueError, match="eval_split: received 'test', whose columns or classes are not those"):
        load_task("a/b", dataset_dir=write("test", [0, 1], other))


# --- examples -------------------------------------------------------------------------------------------------------


def rows_of(sizes: list[tuple[int, int]]) -> Dataset:
    columns = {
        "img": [picture(i % 3, size) for i, size in enumerate(sizes)],
        "label": [i % 3 for i in range(len(sizes))],
    }
    return Dataset.from_dict(columns, FEATURES)


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["in memory", "decoded each time"])
def test_a_batch_is_transformed_together(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_data, "_MEMORY", memory)
    batches: list[int] = []

    def transform(images: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        batches.append(len(images))
        return torch.stack(list(images)).float()

    images = Images(rows_of([(6, 8)] * 5), ("img", "label"), transform)
    examples = images.__getitems__([4, 0, 2])
    assert (images.decoded is None) == (memory == 0)
    assert batches == [3] and len(images) == 5
    assert [example["labels"] for example in examples] == [1, 0, 2]
    assert torch.equal(examples[0]["pixel_values"], images[4]["pixel_values"])
    assert torch.equal(examples[0]["pixel_values"], to_tensor(picture(1)).float())


def test_what_is_random_depends_on_the_seed_and_the_batch() -> None:
    def batch(seed: int, *indices: int) -> torch.Tensor:
        images = Images(
            rows_of([(16, 16)] * 8), ("img", "label"), Transforms(16, *STATISTICS, "crop_flip").train, seed
        )
        return torch.stack([example["pixel_values"] for example in images.__getitems__(indices)])

    first, before = batch(0, 0, 3, 6), torch.random.get_rng_state()
    assert torch.equal(first, batch(0, 0, 3, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, batch(1, 0, 3, 6))
    assert not torch.equal(first[0], batch(0, 0, 3, 7)[0])


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        assert to_tensor(picture().convert(mode)).shape == (3, 6, 8)


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize("sizes", [[(32, 32)] * 3, [(40, 28), (31, 64), (9, 9)]], ids=["of one size", "of many"])
def test_the_processor_does_what_evaluation_does(augmentation: str, sizes: list[tuple[int, int]]) -> None:
    transforms = Transforms(24, *STATISTICS, augmentation)
    pictures = [picture(i, size) for i, size in enumerate(sizes)]
    ours = transforms.evaluate([to_tensor(image) for image in pictures])
    saved = transforms.processor()(pictures, return_tensors="pt")["pixel_values"]
    assert ours.shape == saved.shape == (3, 3, 24, 24)
    # A level of 255, for rounding: by the smallest standard deviation.
    torch.testing.assert_close(ours, saved, rtol=0, atol=1.01 / 255 / 0.1)
    assert (ours - saved).abs().mean() < 0.01


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip", "resized_crop_flip"])
def test_training_batches(augmentation: str) -> None:
    transforms = Transforms(24, [0.0] * 3, [1.0] * 3, augmentation)
    images = [to_tensor(picture(0, (32, 32)))] * 16
    generator = torch.Generator().manual_seed(0)
    first, second = transforms.train(images, generator), transforms.train(images, generator)
    assert first.shape == (16, 3, 24, 24) and 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, second) == (augmentation == "none")
    assert (len({image.numpy().tobytes() for image in first}) > 8) == (augmentation != "none")
    assert torch.equal(first, transforms.train(images, torch.Generator().manual_seed(0)))


def test_random_crop_moves_each_image_by_itself() -> None:
    image = torch.arange(1, 3 * 16 * 16 + 1).reshape(1, 3, 16, 16)
    moved = random_crop(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0))
    shifts = set()
    for crop in moved:
        # Where pixel (8, 8) went.
        ((_, row, column),) = (crop == image[0, 0, 8, 8]).nonzero().tolist()
        shifts.add((row - 8, column - 8))
        rows, columns = (
            slice(max(0, row - 8), 16 + min(0, row - 8)),
            slice(max(0, column - 8), 16 + min(0, column - 8)),
        )
        assert torch.equal(crop[:, rows, columns], image[0].roll((row - 8, column - 8), (1, 2))[:, rows, columns])
        assert (crop == 0).sum() == 3 * (256 - (16 - abs(row - 8)) * (16 - abs(column - 8)))
    assert shifts == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_random_flip_mirrors_half() -> None:
    image = torch.arange(12).reshape(1, 1, 3, 4)
    flipped = random_flip(image.repeat(400, 1, 1, 1), torch.Generator().manual_seed(0))
    same = (flipped == image).flatten(1).all(1)
    assert 150 < same.sum() < 250
    assert (flipped[~same] == image.flip(-1)).all()


def test_random_resized_crop_takes_parts_of_all_sizes() -> None:
    # A ramp, whose slope in the result says how much of the width was taken.
    ramp = torch.linspace(0, 1, 200)[None, None, None].repeat(1, 1, 100, 1)
    generator = torch.Generator().manual_seed(0)
    crops = torch.cat([random_resized_crop(ramp, 8, generator) for _ in range(300)])
    assert crops.shape == (300, 1, 8, 8)
    taken = (crops[:, 0, 4, 6] - crops[:, 0, 4, 1]) / 5 * 8
    assert 0.1 < taken.min() < 0.3 and 0.6 < taken.max() < 0.7
    assert random_resized_crop(ramp[:, :, :2], 8, generator).shape == (1, 1, 8, 8)
