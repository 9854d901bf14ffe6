"""Batch norms that `pack` leaves out: which, and that not one bit changes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_model import ImageModel
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, RegNetConfig, ResNetConfig

from hf_stompp import BinarizationConfig, binarize, calibrate, pack, unpack, verify
from hf_stompp.folding import _outcome, smallest_reaching
from hf_stompp.patching import binary_layers, packed_layers

pytestmark = pytest.mark.usefixtures("reference_kernels")  # which give what latent layers give, bit for bit

CONFIGS: dict[str, Any] = {
    "basic": (ResNetConfig, {"hidden_sizes": [6, 12], "depths": [1, 2], "layer_type": "basic"}),
    "bottleneck": (ResNetConfig, {"hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck"}),
    "regnet": (RegNetConfig, {"hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "x", "groups_width": 4}),
}


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def frozen() -> Callable[..., nn.Module]:
    """Makes a frozen model whose batch norms are like trained ones, some slopes of which are negative or zero."""

    def make(kind: str, **config: Any) -> nn.Module:
        cls, arguments = CONFIGS[kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForImageClassification.from_config(cls(embedding_size=6, **arguments)).eval()
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.weight.data.normal_()
                norm.weight.data[0] = 0
                norm.bias.data.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        binarize(model, BinarizationConfig(**config))
        calibrate(model, {"pixel_values": pixels(4, 3, 40, 40, seed=0)})
        for layer in binary_layers(model).values():
            layer.set_frozen(1.0, step=1)
        return model.eval()

    return make


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("config", [{}, {"replace_relu": True}, {"activation_levels": "unsigned"}])
def test_not_one_bit_changes(kind: str, config: dict[str, Any], frozen: Callable[..., nn.Module]) -> None:
    model = frozen(kind, **config)
    folded, kept = pack(model), pack(model, fold_batch_norm=False)
    assert folded.config.quantization_config.folded and not kept.config.quantization_config.folded
    for x in (pixels(3, 3, 41, 29), pixels(1, 3, 64, 64), pixels(2, 3, 40, 40).to(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert torch.equal(folded(x).logits, kept(x).logits)
            assert torch.equal(folded(x).logits, model(x).logits)


@pytest.mark.parametrize(("kind", "inside"), [("basic", [0]), ("bottleneck", [0, 1]), ("regnet", [0, 1])])
def test_the_norms_between_binary_convolutions_are_left_out(
    kind: str, inside: list[int], frozen: Callable[..., nn.Module]
) -> None:
    model = frozen(kind)
    blocks = [
        name.removesuffix(".shortcut").partition(".")[2]
        for name, _ in model.named_modules()
        if name.endswith("shortcut")
    ]
    expected = {f"{b}.layer.{i}.{part}" for b in blocks for i in inside for part in ("normalization", "activation")}
    assert set(pack(model).config.quantization_config.folded) == expected


@pytest.mark.parametrize("config", [{"bireal_shortcuts": True}, {"activations": False}])
def test_a_norm_that_no_threshold_follows_stays(config: dict[str, Any], frozen: Callable[..., nn.Module]) -> None:
    model = frozen("basic", **config) if "bireal_shortcuts" in config else None
    if model is None:  # nothing to calibrate
        cls, arguments = CONFIGS["basic"]
        model = AutoModelForImageClassification.from_config(cls(embedding_size=6, **arguments)).eval()
        binarize(model, BinarizationConfig(**config))
        for layer in binary_layers(model).values():
            layer.set_frozen(1.0, step=1)
    assert pack(model).config.quantization_config.folded == []


def test_a_relu_before_a_threshold_below_zero_stays(frozen: Callable[..., nn.Module]) -> None:
    model = frozen("basic", activation_levels="signed")
    for layer in binary_layers(model).values():
        layer.activation_shift.data.fill_(-0.5)  # which every output of a ReLU reaches, and not every input
    packed = pack(model)
    assert packed.config.quantization_config.folded == []
    with torch.no_grad():
        assert torch.equal(packed(pixels(2, 3, 40, 40)).logits, model(pixels(2, 3, 40, 40)).logits)


def test_thresholds_are_the_smallest_numbers_that_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(64).eval()
    slopes = torch.randn(64, generator=generator)
    slopes[:2] = 0
    norm.weight.data, norm.bias.data = slopes, torch.randn(64, generator=generator)
    norm.running_mean, norm.running_var = (
        torch.randn(64, generator=generator),
        torch.rand(64, generator=generator) + 0.1,
    )
    norm.bias.data[:2] = torch.tensor([-1.0, 1.0])  # never and always at least 0
    direction = torch.where(slopes < 0, -1.0, 1.0)

    def reaches(y: Tensor) -> Tensor:
        return _outcome(norm, direction, y) >= 0

    with torch.no_grad():
        found = smallest_reaching(torch.zeros(64), lambda y: _outcome(norm, direction, y))

    below = torch.nextafter(found, torch.tensor(-torch.inf))
    assert found.isfinite().all()
    assert reaches(found)[1:].all() and not reaches(below)[2:].any()
    largest = torch.finfo(torch.float32).max
    assert found[0] == largest and found[1] == -largest
    # In exact arithmetic: μ - b √(σ² + ε) / |w| in the direction of the slope.
    w, b = slopes.double().numpy(), norm.bias.detach().double().numpy()
    mean, deviation = norm.running_mean.double().numpy(), np.sqrt(norm.running_var.double().numpy() + norm.eps)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.sign(w) * (mean - b * deviation / w)
    np.testing.assert_allclose(found[2:].numpy(), exact[2:], rtol=1e-4, atol=1e-6)


def test_a_folded_model_is_loaded_and_saved_as_it_is(frozen: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = frozen("bottleneck")
    packed = pack(model)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    assert loaded.config.quantization_config.folded == packed.config.quantization_config.folded
    ours, theirs = packed.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any("layer.0.normalization" in name for name in ours)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_a_folded_model_cannot_be_unpacked(frozen: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"normalization was folded into thresholds .*fold_batch_norm=False"):
        unpack(pack(frozen("basic")))
    assert binary_layers(unpack(pack(frozen("basic"), fold_batch_norm=False)))


def test_a_folded_module_that_the_model_does_not_have_is_refused(
    frozen: Callable[..., nn.Module], tmp_path: Path
) -> None:
    pack(frozen("basic")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["folded"][0] = "encoder.norm"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"folded in config.json lists .encoder.norm., which is no batch norm or ReLU of ResNet"
    ):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_the_latent_model_is_not_changed(frozen: Callable[..., nn.Module]) -> None:
    model = frozen("basic")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert packed_layers(pack(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Tower(ImageModel):
    """A convolution that is executed twice, on what comes out of two batch norms; and one before a norm and a sum."""

    def add_layers(self) -> None:
        self.stem = nn.Conv2d(3, 8, 3)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        return self.shared(self.norm_one(self.one(x))) + self.shared(self.norm_two(self.two(x)))


def test_a_norm_before_a_convolution_that_is_executed_twice_stays() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tower().eval()
    for norm, value in ((model.norm_one, 0.5), (model.norm_two, -0.5)):
        norm.running_mean.fill_(value)
    binarize(model, BinarizationConfig())
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    packed = pack(model)
    assert not packed.config.quantization_config.folded
    with torch.no_grad():
        assert torch.equal(packed(pixels(2, 3, 9, 9)), model(pixels(2, 3, 9, 9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, "encoder.stages.1.layers.1.activation"], "wrong about encoder.stages.1.layers.1"),
        (lambda names: [name for name in names if "activation" not in name], "wrong about .*activation"),
        (lambda names: [*names, "embedder.pooler"], "lists 'embedder.pooler', which is no batch norm or ReLU"),
        (lambda names: [*names, ""], "lists '', which is no batch norm or ReLU"),
        (lambda names: 5, "folded is 5; allowed: a list of names"),
        (lambda names: [5], "folded is .5.; allowed: a list of names"),
    ],
)
def test_verify_refuses_other_modules_than_what_is_folded(
    change: Any, message: str, frozen: Callable[..., nn.Module], tmp_path: Path
) -> None:
    pack(frozen("basic")).save_pretrained(tmp_path)
    assert verify(tmp_path).ok
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["folded"] = change(quantization["folded"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    failed = [check.message for check in verify(tmp_path).checks if check.status == "failed"]
    assert failed and re.search(message, failed[0])
