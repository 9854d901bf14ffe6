"""The packed convolution: the bits of the frozen latent one, and a sum that integers make of bits alone."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy_convolution import collected, convolve, padded, windows
from torch import Tensor, nn

from hf_stompp import BinarizationConfig
from hf_stompp.layers import BinaryConv2d, BinaryInputConv2d, PackedConv2d

pytestmark = pytest.mark.usefixtures("reference_kernels")  # which give what latent layers give, bit for bit

IN, OUT = 6, 8
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "1x1": {"kernel_size": 1},
    "1x1, stride": {"kernel_size": 1, "stride": 2, "in_channels": 16},
    "padded": {"padding": 1},
    "no bias": {"bias": False, "padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "of two sizes": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "padding larger than the kernel": {"padding": 4},
    "same, even and dilated": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "valid": {"padding": "valid"},
    "whole bytes": {"in_channels": 8, "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": IN, "out_channels": IN, "padding": 1},
    "depthwise with a multiplier": {"groups": IN, "out_channels": 2 * IN, "stride": 2},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
}
RULES: dict[str, dict[str, Any]] = {
    "signed": {},
    "unsigned": {"unsigned": True},
    "no shift": {"learn_activation_shift": False},
    "tensor scale": {"scale": "tensor"},
    "no scale": {"scale": "none"},
    "weights only": {"activations": False},
}


def make_frozen(
    geometry: dict[str, Any] | None = None, *, unsigned: bool = False, seed: int = 0, **config: Any
) -> BinaryConv2d:
    """A fully frozen latent convolution with weights of every kind of zero, and learned tensors off their start."""
    arguments = {"in_channels": IN, "out_channels": OUT, "kernel_size": 3} | (geometry or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(**arguments)
        rules = BinarizationConfig(**config)
        layer = BinaryConv2d.from_float(conv, rules, key="layer", unit=0, unsigned=unsigned)
        with torch.no_grad():
            zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
            layer.weight[0].view(-1)[:4] = zeros[: layer.weight[0].numel()]
            if layer.activation_scale is not None:
                layer.activation_scale.fill_(0.7001)
            if layer.activation_shift is not None:
                layer.activation_shift.normal_(std=0.3)
    layer.set_frozen(1.0, 1)
    return layer


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (2, IN, 7, 6), generator=torch.Generator().manual_seed(seed))


def on_the_edge(layer: BinaryConv2d, x: Tensor) -> Tensor:
    """Images with pixels exactly at the threshold of their channel, and just below it."""
    if layer.activation_scale is None:
        return x
    edge = layer.activation_scale / 2 if layer.unsigned else torch.zeros(1)
    edge = (edge if layer.activation_shift is None else layer.activation_shift).detach().expand(x.shape[1])
    x = x.clone()
    x[0, :, 2, 3], x[0, :, 3, 2] = edge, torch.nextafter(edge, torch.tensor(-torch.inf))
    return x


def packed_rows(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=-1, bitorder="little")


# --- the bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_the_bits_are_signs_in_the_order_of_kernel_row_kernel_column_channel(geometry: dict[str, Any]) -> None:
    layer = make_frozen(geometry)
    packed = PackedConv2d.from_binary(layer)
    signs = layer.weight.detach().numpy() >= 0
    out, channels, height, width = signs.shape
    rows = np.zeros((out, height * width * channels), dtype=bool)
    for h in range(height):
        for w in range(width):
            for c in range(channels):
                rows[:, (h * width + w) * channels + c] = signs[:, c, h, w]
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.shape == (out, -(-channels * height * width // 8))
    assert np.array_equal(packed.weight.numpy(), packed_rows(rows))


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
def test_the_bits_behind_the_last_sign_are_zero(channels: int, kernel: tuple[int, int]) -> None:
    layer = make_frozen({"in_channels": channels, "kernel_size": kernel})
    layer.weight.data.fill_(1.0)
    length = channels * kernel[0] * kernel[1]
    bits = np.unpackbits(PackedConv2d.from_binary(layer).weight.numpy(), axis=-1, bitorder="little")
    assert bits[:, :length].all() and not bits[:, length:].any()


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
def test_its_tensors_are_those_of_the_format(rules: dict[str, Any]) -> None:
    layer = make_frozen({"groups": 2}, **rules)
    state = PackedConv2d.from_binary(layer).state_dict()
    expected = {"weight": (OUT, -(-IN // 2 * 9 // 8)), "bias": (OUT,), "weight_scale": (OUT,)}
    if layer.activation_scale is not None:
        expected |= {"activation_threshold": (IN,), "activation_levels": (2,)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {k: expected[k] for k in state}
    assert state.keys() == expected.keys()
    w = layer.weight.detach().double().numpy()
    mean = np.abs(w).mean(axis=(1, 2, 3))
    alpha = {"channel": mean, "tensor": np.full(OUT, np.abs(w).mean()), "none": np.ones(OUT)}[layer.config.scale]
    np.testing.assert_allclose(state["weight_scale"].numpy(), alpha, rtol=1e-6)
    if layer.activation_scale is not None:
        low = 0.0 if layer.unsigned else -0.7001
        np.testing.assert_allclose(state["activation_levels"].numpy(), [low, 0.7001], rtol=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_it_is_a_convolution_of_the_same_geometry(geometry: dict[str, Any]) -> None:
    layer = make_frozen(geometry).eval()
    packed = PackedConv2d.from_binary(layer)
    assert isinstance(packed, nn.Conv2d) and not packed.training
    for name in nn.Conv2d.__constants__:
        assert getattr(packed, name) == getattr(layer, name), name
    assert "kernel_size" in repr(packed) and "weight_bits=1" in repr(packed)
    assert (packed.bias is None) == (layer.bias is None) and not packed.weight.requires_grad
    if packed.bias is not None:
        packed.bias.data.zero_()
        assert layer.bias.any(), "its bias is its own"


# --- the same as the latent layer, bit for bit -----------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_the_frozen_latent_layer_gives_the_same_bit_for_bit(geometry: dict[str, Any], rules: dict[str, Any]) -> None:
    layer = make_frozen(geometry, **rules)
    packed = PackedConv2d.from_binary(layer)
    for height, width in ((7, 6), (9, 13), (16, 5)):
        x = on_the_edge(layer, images(2, layer.in_channels, height, width, seed=height))
        with torch.no_grad():
            assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("rules", [RULES["signed"], RULES["unsigned"], RULES["weights only"]], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [GEOMETRIES["padded"], GEOMETRIES["1x1, stride"], GEOMETRIES["groups"], GEOMETRIES["circular"]],
    ids=str,
)
@torch.no_grad()
def test_so_it_does_in_every_layout_and_dtype(geometry: dict[str, Any], rules: dict[str, Any]) -> None:
    layer = make_frozen(geometry, **rules)
    packed = PackedConv2d.from_binary(layer)
    x = images(2, layer.in_channels, 9, 11)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed(last), layer(last))
    assert torch.equal(packed(x[0]), layer(x[0])), "an image without a batch"
    empty = packed(x[:0])
    assert empty.shape == layer(x[:0]).shape and len(empty) == 0
    with torch.autocast("cpu", torch.bfloat16):
        for each in (x, x.bfloat16(), last):
            ours, theirs = packed(each), layer(each)
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    half = copy.deepcopy(layer)
    if half.bias is not None:
        half.bias.data = half.bias.data.bfloat16()
    assert torch.equal(copy.deepcopy(packed).to(torch.bfloat16)(x.bfloat16()), half(x.bfloat16()))


@torch.no_grad()
def test_a_latent_layer_in_channels_last_packs_to_the_same_bits() -> None:
    layer = make_frozen({"padding": 1, "groups": 2})
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    ours, theirs = PackedConv2d.from_binary(twin), PackedConv2d.from_binary(layer)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    x = images().contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours(x), twin(x))


# --- integers --------------------------------------------------------------------------------------------------------


_ONES = np.array([bin(byte).count("1") for byte in range(256)])


def popcount(rows: np.ndarray) -> np.ndarray:
    """How many bits of the bytes of each row are set."""
    return _ONES[rows].sum(axis=-1)


def of_bits(packed: PackedConv2d, x: np.ndarray) -> np.ndarray:
    """The output, counted in bits: of the inputs and of the weights only whole bytes are seen.

    With levels m - d and m + d, the sum over n taps is `d (n - 2 popcount(x ^ w)) + m (2 popcount(w) - n)`. A tap
    outside of the image is in none of the counts.
    """
    low, high = (level.item() for level in packed.activation_levels.double())
    middle, half = (low + high) / 2, (high - low) / 2
    scale = packed.weight_scale.double().numpy()
    bias = np.zeros(packed.out_channels) if packed.bias is None else packed.bias.detach().double().numpy()
    bits = padded(packed, x >= packed.activation_threshold.numpy()[:, None, None])
    inside = padded(packed, np.ones_like(x)) > 0  # zeros stand outside; what is repeated is inside

    def rows_of_bytes(window: np.ndarray) -> np.ndarray:
        """`[batch, groups, bytes]`, the bits in the order of the weights'."""
        batch, channels, height, width = window.shape
        grouped = window.reshape(batch, packed.groups, channels // packed.groups, height, width)
        return packed_rows(grouped.transpose(0, 1, 3, 4, 2).reshape(batch, packed.groups, -1).astype(bool))

    weights = packed.weight.numpy().reshape(packed.groups, -1, packed.weight.shape[1])

    def pixels() -> Iterator[tuple[int, int, np.ndarray]]:
        for (row, column, window), (_, _, there) in zip(windows(packed, bits), windows(packed, inside), strict=True):
            valid = rows_of_bytes(there)[:, :, None]
            different = popcount((rows_of_bytes(window)[:, :, None] ^ weights) & valid)
            count, positive = popcount(valid), popcount(weights & valid)
            sums = half * (count - 2 * different) + middle * (2 * positive - count)
            yield row, column, sums.reshape(len(x), -1) * scale + bias

    return collected(pixels())


@pytest.mark.parametrize("rules", [RULES["signed"], RULES["unsigned"]], ids=["signed", "unsigned"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_integers_give_the_same_from_the_bits_alone(geometry: dict[str, Any], rules: dict[str, Any]) -> None:
    layer = make_frozen(geometry, **rules)
    packed = PackedConv2d.from_binary(layer)
    x = on_the_edge(layer, images(2, layer.in_channels, 7, 6))
    expected = of_bits(packed, x.numpy())
    found = packed(x).detach().numpy()
    assert found.shape == expected.shape
    # Sums that cancel are as exact as what is summed.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_padding_of_zeros_takes_no_part_whatever_the_levels() -> None:
    packed = PackedConv2d.from_binary(make_frozen({"padding": 1, "in_channels": 1, "out_channels": 1, "bias": False}))
    packed.weight.copy_(torch.tensor([[255, 1]]))
    packed.weight_scale.fill_(1.0)
    packed.activation_threshold.zero_()
    packed.activation_levels.copy_(torch.tensor([-1.0, 1.0]))
    inside = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]])
    assert torch.equal(packed(torch.full((1, 1, 3, 3), 0.0))[0, 0], inside)
    assert torch.equal(packed(torch.full((1, 1, 3, 3), -1e-30))[0, 0], -inside)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_float_inputs_meet_the_weights_of_the_bits(geometry: dict[str, Any]) -> None:
    packed = PackedConv2d.from_binary(make_frozen(geometry, activations=False))
    kernel = (packed.out_channels, *packed.kernel_size, packed.in_channels // packed.groups)
    bits = np.unpackbits(packed.weight.numpy(), axis=-1, bitorder="little")[:, : int(np.prod(kernel[1:]))]
    weight = (2.0 * bits.reshape(kernel).transpose(0, 3, 1, 2) - 1) * packed.weight_scale.double().numpy()[
        :, None, None, None
    ]
    x = images(2, packed.in_channels, 7, 6)
    expected = convolve(packed, x.double().numpy(), weight)
    np.testing.assert_allclose(packed(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


# --- floats again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
@torch.no_grad()
def test_to_float_is_an_ordinary_convolution_with_the_exact_weight(geometry: dict[str, Any]) -> None:
    layer = make_frozen(geometry, activations=False)
    packed = PackedConv2d.from_binary(layer)
    floats = packed.to_float()
    assert type(floats) is nn.Conv2d
    w = layer.weight.numpy()
    scale = packed.weight_scale.numpy()[:, None, None, None]
    assert np.array_equal(floats.weight.numpy(), np.where(w >= 0, scale, -scale))
    assert torch.equal(floats(images(2, layer.in_channels, 7, 6)), packed(images(2, layer.in_channels, 7, 6)))


@pytest.mark.parametrize("rules", [RULES["signed"], RULES["unsigned"]], ids=["signed", "unsigned"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
@torch.no_grad()
def test_the_dequantized_layer_gives_the_same_bit_for_bit(geometry: dict[str, Any], rules: dict[str, Any]) -> None:
    layer = make_frozen(geometry, **rules)
    packed = PackedConv2d.from_binary(layer)
    floats = BinaryInputConv2d.from_packed(packed)
    assert isinstance(floats, nn.Conv2d) and floats.weight.dtype == torch.float32
    assert floats.weight.shape == layer.weight.shape
    x = on_the_edge(layer, images(2, layer.in_channels, 7, 6))
    assert torch.equal(floats(x), packed(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_made_in_half_precision_is_the_rounded_one(dtype: torch.dtype) -> None:
    packed = PackedConv2d.empty(nn.Conv2d(3, 5, (2, 3)), binary_input=False)
    packed.weight.random_(0, 256)
    packed.weight_scale.copy_(torch.tensor([0.0, 1e-9, 1e-6, 0.0123, 7.0]))
    assert torch.equal(packed.dequantized_weight(dtype), packed.dequantized_weight().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [PackedConv2d, BinaryInputConv2d])
def test_half_precision_keeps_scales_thresholds_and_bits(kind: type[nn.Module], dtype: torch.dtype) -> None:
    packed = PackedConv2d.from_binary(make_frozen())
    layer = packed if kind is PackedConv2d else BinaryInputConv2d.from_packed(packed)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    after = layer.to(dtype).state_dict()
    rounded = {"bias"} if kind is PackedConv2d else {"bias", "weight"}
    for name, tensor in before.items():
        assert after[name].dtype == (dtype if name in rounded else tensor.dtype), name
        assert name in rounded or torch.equal(after[name], tensor), name


def test_the_dequantized_weight_has_the_memory_order_of_a_latent_one() -> None:
    for geometry in GEOMETRIES.values():
        layer = make_frozen(geometry)
        weight = PackedConv2d.from_binary(layer).dequantized_weight()
        assert weight.stride() == layer.weight.stride()
