"""The kernel for GPUs against numpy in float64: in Triton's interpreter on a CPU, sampled over shapes and on values at
the edges, and as compiled where there is a GPU. What it is compiled to can be seen without one."""

import importlib.util
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_stompp import kernels
from hf_stompp.layers import PackedLinear

pytest.importorskip("triton", reason="triton is not installed: there is no kernel for GPUs to test")

GENERATOR = np.random.default_rng(0)
LEVELS = {"signed": (-0.7, 0.7), "unsigned": (0.0, 0.7)}
SHAPES = [(0, 3, 5), (1, 1, 1), (1, 200, 200), (200, 1, 1), (16, 256, 32), (17, 257, 33), (129, 65, 130)]
SHAPES += [tuple(GENERATOR.integers(1, 201, 3).tolist()) for _ in range(16)]
INF, NAN = float("inf"), float("nan")


def load() -> Any:
    """The module, as one of its own: whether its kernel is interpreted was decided when it was imported, which others
    in this process may have done."""
    spec = importlib.util.find_spec("hf_stompp.kernels.gpu")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The module, interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield load()


def layer(features: int, outputs: int, kind: str, bias: bool = True) -> PackedLinear:
    """A packed layer of random bits, scales, thresholds and bias."""
    generator = torch.Generator().manual_seed(0)
    packed = PackedLinear.empty(nn.Linear(features, outputs, bias=bias), binary_input=True)
    signs = torch.randint(0, 2, (outputs, features), generator=generator).numpy()
    packed.weight.data.copy_(torch.from_numpy(np.packbits(signs, axis=-1, bitorder="little")))
    packed.weight_scale.copy_(torch.rand(outputs, generator=generator) + 0.01)
    packed.activation_threshold.copy_(torch.randn(features, generator=generator) / 3)
    packed.activation_levels.copy_(torch.tensor(LEVELS[kind]))
    return packed


def by(gpu: Any, packed: PackedLinear, x: Tensor) -> Tensor:
    return gpu.linear(x, packed.operands())


def check(y: Tensor, packed: PackedLinear, x: Tensor) -> None:
    """Against each output's sum, added up in float64; errors are held against the size of its terms."""
    rows, threshold = x.detach().cpu().float().numpy(), packed.activation_threshold.cpu().numpy()
    bits = np.unpackbits(packed.weight.cpu().numpy(), axis=-1, count=rows.shape[-1], bitorder="little")
    low, high = packed.activation_levels.double().tolist()
    scale = packed.weight_scale.cpu().double().numpy()
    bias = 0 if packed.bias is None else packed.bias.detach().cpu().double().numpy()
    # At or above its threshold, which a NaN is not.
    sums = np.where(rows >= threshold, high, low) @ np.where(bits == 1, 1.0, -1.0).T * scale
    assert y.dtype == x.dtype and y.shape == sums.shape
    error = np.abs(y.detach().cpu().double().numpy() - (sums + bias))
    relative = 1e-6 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    assert (error <= relative * (np.abs(sums) + np.abs(bias)) + 1e-30).all()


@pytest.mark.parametrize("large", [False, True], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("kind", list(LEVELS))
@pytest.mark.parametrize(("rows", "features", "outputs"), SHAPES)
@torch.no_grad()
def test_all_shapes(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, rows: int, features: int, outputs: int, kind: str, large: bool
) -> None:
    monkeypatch.setattr(gpu, "_PROGRAMS", 1 if large else 1 << 30)
    packed = layer(features, outputs, kind, bias=rows % 2 == 0)
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows))
    check(by(gpu, packed, x), packed, x)


def test_tiles_are_as_large_as_keeps_a_gpu_busy(gpu: Any) -> None:
    large, middle, small = gpu._TILES
    assert gpu._tile(4096, 768) == gpu._tile(65, 1 << 20) == large
    assert gpu._tile(512, 3072) == gpu._tile(64, 1 << 20) == middle
    assert gpu._tile(1, 1 << 20) == gpu._tile(128, 768) == gpu._tile(1, 1) == small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(LEVELS))
@torch.no_grad()
def test_values_on_the_edge_of_a_bit(gpu: Any, kind: str, dtype: torch.dtype) -> None:
    """At the threshold is above it, also -0 at 0; NaN is below any."""
    packed = layer(48, 40, kind)
    packed.activation_threshold[:8] = 0
    packed.activation_threshold[8], packed.activation_threshold[9] = INF, -INF
    x = torch.randn(4, 48).to(dtype)
    x[0, :8] = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1e-45, -1e-45, 0.0])
    x[1] = packed.activation_threshold
    x[2] = torch.nextafter(x[1], torch.tensor(-INF, dtype=dtype))
    if dtype == torch.bfloat16:
        x[2, :8] = -1e-30  # of a subnormal bfloat16 the interpreter makes 0
    x[3] = NAN
    check(by(gpu, packed, x), packed, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(LEVELS))
@torch.no_grad()
def test_half_precision(gpu: Any, kind: str, dtype: torch.dtype) -> None:
    packed = layer(100, 70, kind).to(dtype)
    x = torch.randn(2, 5, 100).to(dtype)
    check(by(gpu, packed, x), packed, x)


@torch.no_grad()
def test_inputs_of_any_layout(gpu: Any) -> None:
    packed = layer(50, 40, "signed")
    whole = torch.randn(4, 100, 6)
    for x in (whole[:, ::2].transpose(1, 2), whole[:, :50, 2], whole[0, :50, 0], whole[:, :50].mT[:, :0]):
        check(by(gpu, packed, x), packed, x)


@torch.no_grad()
def test_layers_of_any_layout(gpu: Any) -> None:
    packed, x = layer(50, 40, "unsigned"), torch.randn(3, 50)
    packed.weight.data = packed.weight.data.T.contiguous().T
    packed.weight_scale = torch.rand(40, 2)[:, 0]
    packed.bias.data = torch.randn(1).expand(40)
    packed.activation_threshold = torch.randn(50, 2)[:, 1]
    check(by(gpu, packed, x), packed, x)


def test_what_does_not_work_is_found_out(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.try_out(torch.device("cpu"))
    monkeypatch.setattr(gpu, "_linear", {})
    with pytest.raises(KeyError):
        gpu.try_out(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "tile"), [(80, 0), (90, 0), (90, 1), (90, 2), (120, 0)])
def test_it_is_compiled_to_products_of_int8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, tile: int
) -> None:
    """On tensor cores, and in the 99 KB of shared memory that any GPU of these has."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = load()
    floats = dict.fromkeys(("input", "weight_scale", "bias", "threshold", "levels", "out"), "*fp32")
    sizes = dict.fromkeys(("rows", "features", "outputs", "row_bytes", "across"), "i32")
    *constants, warps = compiled._TILES[tile]
    constexprs = dict(zip(("HEIGHT", "WIDTH", "DEPTH"), constants, strict=True))
    types = floats | {"weight": "*u8"} | sizes | dict.fromkeys(constexprs, "constexpr")
    signature = {name: types[name] for name in compiled._linear.arg_names}
    source = triton.compiler.ASTSource(compiled._linear, signature, constexprs)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert "s32.s8.s8" in kernel.asm["ptx"] and "mma" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 99 * 1024


def test_it_runs_where_it_is_asked_for() -> None:
    assert not kernels.on_gpu(0)
    with kernels.use("triton"):
        assert kernels.backend() == ("cpu" if find_spec("numba") else "reference")  # CPUs are as they were
        if torch.version.cuda is None:
            with pytest.raises(RuntimeError, match='"triton" cannot run on cuda:0: not an NVIDIA GPU'):
                kernels.on_gpu(0)
        with kernels.use("reference"):
            assert not kernels.on_gpu(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(LEVELS))
@torch.no_grad()
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    compiled = load()
    for rows, features, outputs in ((1, 1, 1), (3, 200, 70), (100, 768, 3000), (300, 769, 5000), (4096, 768, 768)):
        packed = layer(features, outputs, kind).to("cuda", dtype)
        x = torch.randn(rows, features, device="cuda", dtype=dtype)
        check(by(compiled, packed, x), packed, x)
        if dtype == torch.float32:
            with kernels.use("reference"):
                reference = packed(x)
            with kernels.use("triton"):
                y = packed(x)
            torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())
