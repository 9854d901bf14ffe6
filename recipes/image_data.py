"""Images and their classes: from the Hub, from folders, scikit-learn's digits; and what is done to a batch of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.data
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import Image as PILImage
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTImageProcessorPil

from glue_tasks import first_rows
from hf_stompp.scoring import read_split

# Images that take more than this when decoded are decoded each time they are used.
_MEMORY = 1 << 30
# Share of the shortest edge that the central crop of an evaluated image keeps, as ImageNet models are evaluated.
_CENTRAL = 0.875

Augmentation = Literal["none", "crop", "crop_flip", "resized_crop_flip"]
Transform = Callable[[Sequence[Tensor], torch.Generator], Tensor]


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTask:
    """An image classification task: what to train on and to score on, and the columns of images and of classes."""

    train: Dataset
    evaluation: Dataset
    columns: tuple[str, str]

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their codes."""
        return self.train.features[self.columns[1]].names


def load_task(
    name: str | None,
    config: str | None = None,
    dataset_dir: str | Path | None = None,
    eval_split: str = "test",
    columns: tuple[str | None, str | None] = (None, None),
    limits: tuple[int | None, int | None] = (None, None),
) -> ImageTask:
    """Load and check the training split of an image data set and the one that models are scored on.

    Args:
        name (`str`, *optional*): its id on the Hub, or `digits`.
        config (`str`, *optional*): which of its configs.
        dataset_dir (`str` or `Path`, *optional*): a folder of parquet files, `train.parquet` or the Hub's
            `train-00000-of-00001.parquet` …, or of images, `train/<class>/*.png` …
        eval_split (`str`, *optional*, defaults to `"test"`): the split to score on.
        columns (*optional*): that of the images and that of the classes; without a name, the one column of its kind.
        limits (*optional*): keep the first rows of the training split, of the other, only.

    Raises:
        ValueError: no such column or several, a label that is no class, a sample limit below one.
        FileNotFoundError: no such folder, or no file of a split in it.
        ConnectionError: the Hub cannot be reached.

    Example:

        >>> len(load_task("digits").train)
        1437
    """
    splits = []
    for split, limit in zip(("train", eval_split), limits, strict=True):
        rows = _read(name, config, split, dataset_dir)
        image = _column(rows, "image_column", columns[0], Image, split)
        label = _column(rows, "label_column", columns[1], ClassLabel, split)
        splits.append(first_rows(rows.select_columns([image, label]), limit, split))
        _check_rows(splits[-1], image, label, split)
    train, evaluation = splits
    if train.features != evaluation.features:
        raise ValueError(
            f"eval_split: received {eval_split!r}, whose columns or classes are not those of the split 'train': "
            f"{evaluation.features} and {train.features}. Take both from one data set."
        )
    return ImageTask(train, evaluation, (image, label))


def _read(name: str | None, config: str | None, split: str, dataset_dir: str | Path | None) -> Dataset:
    if dataset_dir is None and name == "digits":
        return digits(split)
    return read_split(name, config, split, dataset_dir)


def digits(split: str) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels, of which every fifth of each class is for the test.

    Example:

        >>> digits("test")[0]["image"].size
        (8, 8)
    """
    if split not in ("train", "test"):
        raise ValueError(f"eval_split: received {split!r}, but digits has the splits train and test only. Pass test.")
    data = load_digits()
    levels = (data.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(np.arange(len(levels)), test_size=360, stratify=data.target, random_state=0)
    chosen = parts[split == "test"]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    columns = {"image": [fromarray(levels[i]) for i in chosen], "label": data.target[chosen]}
    return Dataset.from_dict(columns, features)


def _column(rows: Dataset, flag: str, name: str | None, kind: type, split: str) -> str:
    """The column asked for, or the only one of its kind."""
    fitting = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        name = fitting[0]
    if name is None or name not in fitting:
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
        raise ValueError(
            f"{flag}: received {name!r}; allowed: one column of type {kind.__name__} of the split {split!r}, which "
            f"has {columns}. " + (f"Pass --{flag} {fitting[0]}, say." if fitting else "Cast a column, or add it.")
        )
    return name


def _check_rows(rows: Dataset, image: str, label: str, split: str) -> None:
    """Raise unless every row has an image and a class."""
    empty = rows.data.column(image).null_count
    if empty:
        raise ValueError(f"the column {image!r} of the split {split!r}: {empty} rows have no image. Drop them.")
    count = rows.features[label].num_classes
    for code in rows.unique(label):
        if code is None or not 0 <= code < count:
            raise ValueError(
                f"the column {label!r} of the split {split!r}: received {code!r}; allowed: 0 to {count - 1}. -1 marks "
                "the hidden labels of a test split, which cannot be scored: pass another --eval_split."
            )


# --- what the Trainer reads -----------------------------------------------------------------------------------------


class Images(torch.utils.data.Dataset):
    """Examples for the Trainer; images are decoded once if memory allows, and those of a batch transformed together.

    What is random in a batch is a function of the seed and of the batch's indices, which the Trainer draws anew in
    each epoch: so a run that is resumed goes on as it would have, whatever a `DataLoader` fetches ahead, and in
    whichever process. (Batches of one image would be the same in all epochs.)

    Args:
        rows (`Dataset`): Images and labels.
        columns (`tuple[str, str]`): Their names.
        transform: RGB images, uint8 `[3, height, width]` each, and a generator → what the model sees,
            `[images, 3, size, size]`.
        seed (`int`, *optional*, defaults to 0): Of what is random.
    """

    def __init__(self, rows: Dataset, columns: tuple[str, str], transform: Transform, seed: int = 0) -> None:
        image_column, label_column = columns
        self.rows = rows.select_columns(image_column)
        self.labels = rows[label_column][:]
        self.transform, self.seed = transform, seed
        self.decoded: list[Tensor] | None = None
        if len(rows) * self._decode(0).numel() <= _MEMORY:
            self.decoded = [self._decode(index) for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """What a `DataLoader` calls for the examples of a batch."""
        images = [self._decode(index) if self.decoded is None else self.decoded[index] for index in indices]
        generator = torch.Generator().manual_seed(hash((self.seed, *indices)))
        pixels = self.transform(images, generator)
        return [{"pixel_values": p, "labels": self.labels[i]} for p, i in zip(pixels, indices, strict=True)]

    def _decode(self, index: int) -> Tensor:
        (image,) = self.rows[index].values()
        return to_tensor(image)


def to_tensor(image: PILImage) -> Tensor:
    """An image in RGB, uint8 `[3, height, width]`."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


# --- transforms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transforms:
    """What is done to images before a model sees them, in training, in evaluation, and by who loads it later.

    Args:
        size (`int`): Side in pixels of what the model sees.
        mean, std (`Sequence[float]`): Of the red, green and blue values in [0, 1]: what is subtracted, and divided by.
        augmentation (`str`): In training; `resized_crop_flip` also crops the centre of what is evaluated.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    augmentation: Augmentation = "none"

    def train(self, images: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """A batch, each image augmented for itself."""
        return self._each_shape(images, lambda batch: self._augment(batch, generator))

    def evaluate(self, images: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """A batch, as `processor` makes it; nothing is random."""
        return self._each_shape(images, self._crop_centre if self._crops else self._resize)

    def processor(self) -> ViTImageProcessorPil:
        """Does what `evaluate` does, out of the model's own folder."""
        statistics = {"image_mean": list(self.mean), "image_std": list(self.std)}
        side = {"height": self.size, "width": self.size}
        if self._crops:
            edge = {"shortest_edge": self._edge}
            return ViTImageProcessorPil(size=edge, do_center_crop=True, crop_size=side, **statistics)
        return ViTImageProcessorPil(size=side, **statistics)

    @property
    def _crops(self) -> bool:
        return self.augmentation == "resized_crop_flip"

    @property
    def _edge(self) -> int:
        return int(self.size / _CENTRAL)

    def _each_shape(self, images: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
        """All in one go if they have one shape, else one by one; then to floats."""
        if len({image.shape for image in images}) == 1:
            pixels = function(torch.stack(list(images)))
        else:
            pixels = torch.cat([function(image[None]) for image in images])
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return pixels.float().sub_(mean).div_(std)

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self._crops:
            crops = [random_resized_crop(image[None], self.size, generator) for image in images]
            return random_flip(torch.cat(crops), generator)
        if self.augmentation != "none":  # before they are enlarged, where there is less to move
            images = random_crop(images, generator)
        if self.augmentation == "crop_flip":
            images = random_flip(images, generator)
        return self._resize(images)

    def _resize(self, images: Tensor) -> Tensor:
        return resize(images, (self.size, self.size))

    def _crop_centre(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = self._edge / min(height, width)
        images = resize(images, (max(self._edge, int(scale * height)), max(self._edge, int(scale * width))))
        top, left = ((side - self.size) // 2 for side in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, and smoothed where they shrink, as Pillow does it."""
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of them, left to right."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def random_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each by up to an eighth of its sides, 4 pixels of 32, and fill up with black."""
    height, width = images.shape[-2:]
    down, right = height // 8, width // 8
    padded = F.pad(images, (right, right, down, down))
    tops = torch.randint(2 * down + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(2 * right + 1, (len(images),), generator=generator).tolist()
    moved = zip(padded, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in moved])


def random_resized_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A part of one image `[1, 3, height, width]`, 8 to 100 % of its area and 3:4 to 4:3 in shape, in the size given.

    Source: arXiv 1409.4842, section 6, as torchvision has it.
    """
    height, width = image.shape[-2:]
    for _ in range(10):
        area, shape = torch.rand(2, generator=generator).tolist()
        area, ratio = (0.08 + 0.92 * area) * height * width, math.exp((2 * shape - 1) * math.log(4 / 3))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            break
    else:  # an image so long that hardly any part fits
        h = w = min(height, width)
    top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in (height - h, width - w))
    return resize(image[..., top : top + h, left : left + w], (size, size))
