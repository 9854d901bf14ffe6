"""Models of timm in transformers' wrapper: the base model is timm's own, head and all."""

import importlib.util
from pathlib import Path

import pytest
import torch
from image_model import ImageModel
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_stompp import BinarizationConfig, binarize, calibrate, pack
from hf_stompp.patching import binary_layers
from hf_stompp.selection import select


class Backbone(nn.Module):
    """What hf_stompp asks of a model of timm: a size to be run at, and which of its layers are the head."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 20, 12)}
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)
        self.size: tuple[int, ...] = ()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        self.size = tuple(x.shape)
        return self.fc(self.conv(self.stem(x).relu()).mean((2, 3)))


class Wrapper(ImageModel):
    base_model_prefix = "timm_model"

    def add_layers(self) -> None:
        self.timm_model = Backbone()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.timm_model(pixel_values))


def freeze(model: PreTrainedModel, pixels: Tensor) -> PreTrainedModel:
    calibrate(model, {"pixel_values": pixels})
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    return model.eval()


def test_the_classifier_of_a_wrapped_model_is_its_head() -> None:
    plans = {plan.name: plan for plan in select(Wrapper(), BinarizationConfig())}
    roles = {name: plan.role for name, plan in plans.items()}
    assert roles == {"timm_model.stem": "stem", "timm_model.conv": "encoder", "timm_model.fc": "head"}
    assert plans["timm_model.conv"].key == "conv" and plans["timm_model.conv"].unsigned


@pytest.mark.usefixtures("reference_kernels")
def test_a_wrapped_model_is_binarized_and_packed() -> None:
    model = binarize(Wrapper(), BinarizationConfig())
    pixels = torch.randn(2, 3, 20, 12, generator=torch.Generator().manual_seed(0))
    packed = pack(freeze(model, pixels))
    with torch.no_grad():
        assert torch.equal(packed(pixels).logits, model(pixels).logits)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("timm", "torchvision")),
    reason="timm and torchvision, which transformers' wrapper of its models needs, are not both installed",
)
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv2_100", "convnext_atto"])
def test_models_of_timm_are_packed_and_loaded(name: str, tmp_path: Path) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    model = binarize(TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name)), BinarizationConfig())
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    pack(freeze(model, pixels)).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        tensor.data = tensor.data.clone()  # where it lies in a file decides on the order of sums
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)
