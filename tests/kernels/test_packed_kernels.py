"""The kernels of packed layers against float64, sampled over shapes and on values at the edges."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_stompp import kernels
from hf_stompp.kernels.operands import PANELS
from hf_stompp.layers import PackedConv2d, PackedLinear
from hf_stompp.packing import pack_signs

pytest.importorskip("numba", reason="the extra `fast` is not installed: there are no kernels to test")

GENERATOR = np.random.default_rng(0)
LEVELS = {"signed": (-0.7, 0.7), "unsigned": (0.0, 0.7), "weights only": None}
SHAPES = [
    (0, 3, 5),
    (1, 1, 1),
    (1, 200, 200),
    (200, 1, 1),
    (2, 0, 3),
    (60, 0, 70),
    (6, 64, 64),
    (7, 63, 65),
    (49, 31, 33),
    (48, 32, 64),
]
SHAPES += [tuple(GENERATOR.integers(1, 201, 3).tolist()) for _ in range(40)]
INF, NAN = float("inf"), float("nan")


def fill(layer: Any, weight: Tensor, levels: tuple[float, float] | None, seed: int = 0) -> Any:
    """A packed layer with the signs of a weight, and scales, thresholds and a bias of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    packed = (PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear).empty(layer, levels is not None)
    packed.weight.data.copy_(pack_signs(packed._as_rows(weight)))
    packed.weight_scale.copy_(torch.rand(packed.outputs, generator=generator) + 0.01)
    if levels is not None:
        packed.activation_threshold.copy_(torch.randn(packed.input_features, generator=generator) / 3)
        packed.activation_levels.copy_(torch.tensor(levels))
    return packed


def linear(features: int, outputs: int, kind: str, bias: bool = True, seed: int = 0) -> tuple[Any, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(features, outputs, bias=bias)
        weight = torch.randn(outputs, features)
    return fill(layer, weight, LEVELS[kind]), torch.where(weight >= 0, 1.0, -1.0)


def in_float64(packed: Any, x: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear layer gives, and the size of what is added for it, against which an error is to be held."""
    inputs = x.double()
    if packed.activation_threshold is not None:
        low, high = packed.activation_levels.double()
        inputs = torch.where(x.float() >= packed.activation_threshold, high, low)
    sums, scale = inputs @ signs.double().T, packed.weight_scale.double()
    bias = torch.zeros_like(scale) if packed.bias is None else packed.bias.double()
    size = sums.abs() if packed.activation_threshold is not None else inputs.abs() @ signs.double().abs().T
    return sums * scale + bias, size * scale + bias.abs()


@pytest.mark.parametrize("kind", list(LEVELS))
@pytest.mark.parametrize(("rows", "features", "outputs"), SHAPES)
@torch.no_grad()
def test_linear_layers_of_all_shapes(rows: int, features: int, outputs: int, kind: str) -> None:
    packed, signs = linear(features, outputs, kind, bias=rows % 2 == 0)
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows))
    with kernels.use("cpu"):
        y = packed(x)
    expected, size = in_float64(packed, x, signs)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert ((y - expected).abs() <= 1e-6 * size + 1e-30).all()


@torch.no_grad()
def test_sums_of_more_features_than_short_integers_count() -> None:
    packed = fill(nn.Linear(70_000, 3), torch.ones(3, 70_000), (-1.0, 1.0))
    packed.activation_threshold.zero_()
    with kernels.use("cpu"):
        for sign in (-1.0, 1.0):
            y = packed(torch.full((5, 70_000), sign))
            assert torch.allclose(y, (sign * 70_000 * packed.weight_scale + packed.bias).expand(5, 3), rtol=1e-6)


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
@torch.no_grad()
def test_values_on_the_edge_of_a_bit(kind: str) -> None:
    """At the threshold is above it, also -0 at 0; NaN is below any."""
    packed, signs = linear(48, 70, kind)
    packed.activation_threshold[:8] = 0
    x = torch.randn(3, 48)
    x[0, :8] = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1e-45, -1e-45, 0.0])
    x[1] = packed.activation_threshold
    x[2] = torch.nextafter(packed.activation_threshold, torch.tensor(-INF))
    with kernels.use("cpu"):
        y = packed(x)
    expected, size = in_float64(packed, x, signs)
    assert ((y - expected).abs() <= 1e-6 * size).all()


@torch.no_grad()
def test_values_that_are_not_finite_go_on_where_inputs_are_floats() -> None:
    packed, signs = linear(40, 70, "weights only")
    x = torch.randn(3, 40)
    x[0, 3], x[1, 5] = NAN, INF
    with kernels.use("cpu"):
        y = packed(x)
    assert y[0].isnan().all()
    assert torch.equal(y[1], signs[:, 5] * INF)
    assert y[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(LEVELS))
@torch.no_grad()
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    packed, signs = linear(100, 70, kind)
    x = torch.randn(2, 5, 100).to(dtype)
    with kernels.use("cpu"):
        y = packed(x)
    expected, size = in_float64(packed, x.flatten(0, 1), signs)
    assert y.dtype == dtype and y.shape == (2, 5, 70)
    assert ((y.flatten(0, 1) - expected).abs() <= torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("kind", list(LEVELS))
@torch.no_grad()
def test_inputs_of_any_layout(kind: str) -> None:
    packed, signs = linear(50, 70, kind)
    whole = torch.randn(4, 100, 6)
    for x in (whole[:, ::2].transpose(1, 2), whole[:, :50, 2], whole[0, :50, 0], whole[:, :50].mT[:, :0]):
        with kernels.use("cpu"):
            y = packed(x)
        expected, size = in_float64(packed, x, signs)
        assert y.shape == expected.shape and ((y - expected).abs() <= 1e-6 * size).all()


@torch.no_grad()
def test_threads_give_the_same() -> None:
    for kind in LEVELS:
        packed, _ = linear(520, 1030, kind)
        for rows in (5, 97):
            x, threads, results = torch.randn(rows, 520), torch.get_num_threads(), []
            try:
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    with kernels.use("cpu"):
                        results.append(packed(x))
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2)},
    "wider than the image": {"kernel_size": (5, 4), "padding": 4, "dilation": (1, 2)},
    "1x1": {"kernel_size": 1, "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "same": {"kernel_size": 3, "padding": "same"},
}


@pytest.mark.parametrize("kind", list(LEVELS))
@pytest.mark.parametrize("geometry", list(CONVOLUTIONS))
@torch.no_grad()
def test_convolutions(geometry: str, kind: str) -> None:
    for channels, outputs, size in ((2, 2, (7, 5)), (34, 70, (5, 8)), (64, 64, (6, 6))):
        layer = nn.Conv2d(channels, outputs, **CONVOLUTIONS[geometry], bias=channels > 2)
        weight = torch.randn_like(layer.weight)
        packed = fill(layer, weight, LEVELS[kind])
        x = torch.randn(3, channels, *size)
        double = copy.deepcopy(layer).double()
        double.weight.copy_(torch.where(weight >= 0, 1.0, -1.0) * packed.weight_scale.view(-1, 1, 1, 1))
        inputs = x
        if LEVELS[kind] is not None:
            low, high = packed.activation_levels.double()
            inputs = torch.where(x >= packed.activation_threshold.view(-1, 1, 1), high, low)
        expected = double(inputs.double())
        for image in (x, x.to(memory_format=torch.channels_last), x[:0]):
            with kernels.use("cpu"):
                y = packed(image)
            assert y.shape == expected[: len(image)].shape
            # Integers until the end, where the kernels do it; else float32 sums.
            exact = packed.known_to_kernels
            assert torch.allclose(y.double(), expected[: len(image)], rtol=1e-6, atol=2e-6 if exact else 1e-4)


@torch.no_grad()
def test_what_is_written_to_a_layer_is_seen() -> None:
    """What is laid out for the kernels follows the layer: in place, by loading, by another tensor."""
    packed, _ = linear(40, 70, "signed")
    x = torch.randn(4, 40)
    changes: list[Callable[[], Any]] = [
        lambda: packed.weight.bitwise_not_().bitwise_and_(255),
        lambda: packed.weight_scale.mul_(2),
        lambda: packed.bias.add_(1),
        lambda: packed.activation_threshold.add_(0.5),
        lambda: packed.activation_levels.copy_(torch.tensor([0.0, 0.3])),
        lambda: packed.load_state_dict(linear(40, 70, "signed", seed=1)[0].state_dict()),
        lambda: setattr(packed.bias, "data", torch.zeros(70)),
        lambda: packed.register_buffer("weight_scale", torch.ones(70)),
    ]
    for change in changes:
        with kernels.use("cpu"):
            before = packed(x)
        change()
        with kernels.use("cpu"):
            after = packed(x)
        with kernels.use("reference"):
            assert torch.allclose(after, packed(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64, "cpu", "meta"], ids=str)
def test_what_is_laid_out_is_dropped_by_a_cast(cast: Any) -> None:
    packed, signs = linear(40, 70, "signed")
    x = torch.randn(4, 40)
    with kernels.use("cpu"):
        packed(x)
        assert hasattr(packed.weight, PANELS)
        before = packed.weight
        packed.to(cast)
        assert not hasattr(before, PANELS) and not hasattr(packed.weight, PANELS)
        if cast == "meta":
            return
        y = packed(x)
    expected, size = in_float64(packed, x, signs)
    assert ((y - expected).abs() <= 1e-6 * size).all()


@torch.inference_mode()
def test_what_is_written_to_a_layer_from_inference_mode_is_seen() -> None:
    """Its tensors count no versions."""
    packed, _ = linear(40, 70, "signed")
    assert not packed.weight.is_inference() and not packed.weight_scale.is_inference()
    packed.weight_scale, packed.weight = packed.weight_scale.clone(), nn.Parameter(packed.weight.clone(), False)
    assert packed.weight.is_inference() and packed.weight_scale.is_inference()
    x = torch.randn(4, 40)
    for change in (
        lambda: packed.weight_scale.mul_(2),
        lambda: packed.weight.bitwise_not_(),
        lambda: packed.bias.add_(1),
    ):
        with kernels.use("cpu"):
            before = packed(x)
            assert torch.equal(packed(x), before)
            change()
            after = packed(x)
        with kernels.use("reference"):
            assert torch.allclose(after, packed(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_another_default_dtype_or_device_changes_nothing(default: Any) -> None:
    layer = nn.Conv2d(34, 70, 3)
    weights = [fill(layer, torch.randn_like(layer.weight), LEVELS[kind]) for kind in LEVELS]
    cases = [(packed, torch.randn(2, 34, 5, 8)) for packed in weights]
    cases += [(linear(40, 70, kind)[0], torch.randn(rows, 40)) for kind in LEVELS for rows in (3, 60)]
    with kernels.use("cpu"):
        expected = [copy.deepcopy(packed)(x) for packed, x in cases] + [cases[3][0].dequantized_weight()]
        try:
            if default == "meta":
                torch.set_default_device(default)
            else:
                torch.set_default_dtype(default)
            found = [packed(x) for packed, x in cases] + [cases[3][0].dequantized_weight()]
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and one.device.type == "cpu" and torch.equal(one, other)


@torch.no_grad()
def test_levels_that_the_kernels_do_not_know_are_refused() -> None:
    packed, _ = linear(40, 70, "signed")
    packed.activation_levels.copy_(torch.tensor([-0.25, 0.75]))
    with kernels.use("cpu"), pytest.raises(ValueError, match=r"activation_levels is \(-0.25, 0.75\), but the kernels"):
        packed(torch.randn(4, 40))


@torch.no_grad()
def test_integers_are_no_bits_where_no_layer_hands_them_on() -> None:
    packed, _ = linear(2, 70, "signed")
    with kernels.use("cpu"), pytest.raises(TypeError, match="takes floats, but its input is torch.int32"):
        packed(torch.zeros(4, 2, dtype=torch.int32))


@torch.no_grad()
def test_another_memory_at_the_same_address_is_seen() -> None:
    packed, _ = linear(40, 70, "signed")
    x = torch.randn(4, 40)
    with kernels.use("cpu"):
        packed(x)
        packed.weight.data = packed.weight.data.clone()  # the first memory is free for the next
        packed.weight.data = 255 - packed.weight.data
        y = packed(x)
    with kernels.use("reference"):
        assert torch.allclose(y, packed(x), atol=1e-4)


@torch.no_grad()
def test_tensors_of_other_shapes_are_refused_in_layers_too() -> None:
    packed, _ = linear(40, 70, "signed")
    packed.activation_threshold = torch.tensor([0.5])
    with kernels.use("cpu"), pytest.raises(ValueError, match=r"threshold is \(1,\), but that of a packed layer"):
        packed(torch.randn(4, 40))


@torch.no_grad()
def test_graphs_of_what_is_done_have_the_reference() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for kind in LEVELS:
        packed, _ = linear(40, 70, kind)
        x, other = torch.randn(2, 3, 40)
        with kernels.use("cpu"):
            assert torch.allclose(make_fx(packed)(x)(other), packed(other), atol=1e-4)


@torch.no_grad()
def test_copies_make_their_own(tmp_path: Path) -> None:
    """What is laid out is known by its addresses, which mean nothing elsewhere."""
    packed, _ = linear(40, 70, "signed")
    x = torch.randn(4, 40)
    with kernels.use("cpu"):
        y = packed(x)
        torch.save(packed, tmp_path / "layer.pt")
        loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
        assert getattr(loaded.weight, PANELS, None) is None
        for copied in (loaded, copy.deepcopy(packed)):
            assert torch.equal(copied(x), y)
            copied.weight_scale.mul_(2)
            assert not torch.equal(copied(x), y) and torch.equal(packed(x), y)


def test_gradients_are_those_of_the_reference() -> None:
    for kind in LEVELS:
        packed, _ = linear(40, 70, kind)
        gradients = []
        for backend in ("cpu", "reference"):
            packed.bias.grad = None
            x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
            with kernels.use(backend):
                packed(x).square().sum().backward()
            gradients.append((x.grad, packed.bias.grad))
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, rtol=1e-4))
        assert (gradients[0][0] is None) == (kind != "weights only")
    layer = nn.Conv2d(4, 6, 3)
    convolution = fill(layer, layer.weight, LEVELS["signed"])
    with kernels.use("cpu"):
        convolution(torch.randn(2, 4, 5, 6)).sum().backward()
    assert torch.equal(convolution.bias.grad, torch.full((6,), 2.0 * 3 * 4))


@pytest.mark.parametrize("kind", list(LEVELS))
def test_the_operator_is_sound_and_compiles(kind: str) -> None:
    packed, _ = linear(40, 70, kind)
    x = torch.randn(3, 40)
    operands = packed.weight, packed.weight_scale, packed.bias, packed.activation_threshold, packed.activation_levels
    torch.library.opcheck(torch.ops.hf_stompp.packed_linear.default, (x, *operands))
    with torch.no_grad(), kernels.use("cpu"):
        eager = packed(x)
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), eager)
        exported = torch.export.export(packed, (x,))
    assert "hf_stompp.packed_linear" in str(exported.graph)
    assert torch.equal(exported.module()(x), eager)


def test_the_operator_of_convolutions_is_sound_and_compiles() -> None:
    layer = nn.Conv2d(5, 6, (3, 2), stride=(2, 1), padding=(1, 0))
    packed = fill(layer, layer.weight, LEVELS["unsigned"])
    x = torch.randn(2, 5, 6, 7)
    operands = packed.weight, packed.weight_scale, packed.bias, packed.activation_threshold, packed.activation_levels
    geometry = [3, 2], [2, 1], [1, 0], [1, 1]
    torch.library.opcheck(torch.ops.hf_stompp.packed_conv2d.default, (x, *operands, *geometry))
    with torch.no_grad(), kernels.use("cpu"):
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


def test_wrong_shapes_are_refused() -> None:
    packed, _ = linear(40, 70, "signed")
    operands = [packed.weight, packed.weight_scale, packed.bias, packed.activation_threshold, packed.activation_levels]
    for place, name in enumerate(("weight", "weight_scale", "bias", "threshold", "levels")):
        wrong = [tensor[..., :1].contiguous() if i == place else tensor for i, tensor in enumerate(operands)]
        with pytest.raises(ValueError, match=rf"{name} is \(.*, but that of a packed layer for this input is"):
            torch.ops.hf_stompp.packed_linear(torch.randn(2, 40), *wrong)
    with pytest.raises(RuntimeError), kernels.use("cpu"):
        packed(torch.randn(2, 41))


@torch.no_grad()
def test_under_autocast_the_dtype_is_that_of_a_linear_layer() -> None:
    packed, _ = linear(40, 70, "signed")
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16), kernels.use("cpu"):
        y = packed(x)
    with kernels.use("cpu"):
        assert torch.equal(y, packed(x).bfloat16())


@torch.no_grad()
def test_one_weight_may_be_read_in_several_ways() -> None:
    """Rows of 10 and of 12 bits take as many bytes; what was laid out for the one is nothing for the other."""
    weight, scale = torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3)
    for features in (10, 12, 10):
        x = torch.randn(100, features)
        y = torch.ops.hf_stompp.packed_linear(x, weight, scale, None, None, None)
        assert torch.allclose(y, -x.sum(dim=1, keepdim=True).expand(-1, 3), atol=1e-5)


@torch.no_grad()
def test_what_follows_operations_gets_the_reference() -> None:
    """A trace of what the kernels do would be of an uninitialised result."""
    packed, _ = linear(40, 70, "signed")
    x, other = torch.randn(2, 5, 40)
    with kernels.use("cpu"):
        traced = torch.jit.trace(packed, (x,))
        assert torch.allclose(traced(other), packed(other), atol=1e-5)
        assert torch.allclose(torch.vmap(packed)(torch.stack([x, other]))[1], packed(other), atol=1e-5)


@torch.no_grad()
def test_a_kernel_that_does_not_fit_is_refused() -> None:
    layer = nn.Conv2d(3, 4, 5)
    packed = fill(layer, layer.weight, LEVELS["signed"])
    with kernels.use("cpu"), pytest.raises(RuntimeError, match=r"A kernel of \(5, 5\) does not fit"):
        packed(torch.randn(1, 3, 4, 4))
