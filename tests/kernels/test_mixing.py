"""The one-pass kernels against numpy in float64, and against the torch operations that they stand in for."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hf_stompp import kernels
from hf_stompp.functional import mix, weight_scale
from hf_stompp.kernels import compiling

pytest.importorskip("numba", reason="the extra `fast` is not installed: there are no kernels to test")
mixing = kernels.loaded("mixing")

SHAPES = {
    "weight": (96, 200),
    "inputs": (8, 16, 150),
    "images": (6, 12, 16, 17),
    "images, channels last": (6, 12, 16, 17),
    "inputs of four axes": (4, 6, 9, 90),
}


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns the kernels off: `reference()`."""
    return lambda: monkeypatch.setattr(kernels, "backend", lambda: "reference")


def operands(kind: str, mask: Any) -> tuple[Tensor, Tensor, Tensor | bool, Tensor]:
    """Values, their scale or scales, a mask and a gradient. Some values are on the edges; a row of a weight is 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[kind], generator=generator)
    scale = torch.tensor([0.7])
    if kind == "weight":
        x[3] = 0
        scale = x.abs().mean(dim=1, keepdim=True)
    edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.35, 0.7, -0.7, 1.05, -1.05])
    x.view(-1, x.shape[-1])[5, : len(edges)] = edges
    if mask == "drawn":
        shape = x.shape if kind == "weight" else (x.shape[1], 1, 1) if "images" in kind else x.shape[-1:]
        mask = torch.rand(shape, generator=generator) < 0.4
    grad = torch.randn(x.shape, generator=generator)
    if kind == "images, channels last":
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    return x, scale, mask, grad


def in_float64(
    x: Tensor, scale: Tensor, mask: Tensor | bool, grad: Tensor, clip: float | None, unsigned: bool, ste: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """x̂, the gradient of x, and that of the scale if it is one."""
    v, g = x.double().numpy(), grad.double().numpy()
    s = np.broadcast_to(scale.double().numpy(), v.shape)
    frozen = np.broadcast_to(np.asarray(mask), v.shape)
    # The ends are compared against in float32.
    end = np.inf if clip is None else (np.float32(clip) * scale.numpy()).astype(np.float64) * np.ones_like(v)
    low = -end if not unsigned or clip is None else np.zeros_like(v)
    level = np.where(v >= s / 2, 1.0, 0.0) if unsigned else np.where(v >= 0, 1.0, -1.0)
    soft = v if clip is None else np.clip(v, low, end)
    passes = (v >= low) & (v <= end) & (ste | ~frozen)
    clipped = 0.0 if clip is None else np.where(v > end, clip, np.where(v < low, 0.0 if unsigned else -clip, 0.0))
    slope = np.where(frozen, level, clipped)
    return np.where(frozen, level * s, soft), g * passes, float((g * slope).sum())


CASES = [
    pytest.param(kind, mask, clip, unsigned, ste, id=f"{kind}-{mask}-{clip}-{'un' * unsigned}signed-{ste}")
    for kind in SHAPES
    for mask in (True, False, "drawn")
    for clip in (1.5, None)
    for unsigned in (False, True)
    for ste in (False, True)
    if not (mask is False and clip is None)
]


@pytest.mark.parametrize(("kind", "mask", "clip", "unsigned", "ste"), CASES)
def test_values_and_gradients(kind: str, mask: Any, clip: float | None, unsigned: bool, ste: bool) -> None:
    x, scale, mask, grad = operands(kind, mask)
    assert mixing.fits(x) and mixing.fits_with(x, scale, None, mask)
    expected, grad_x, grad_scale = in_float64(x, scale, mask, grad, clip, unsigned, ste)
    x.requires_grad_()
    scale.requires_grad_(kind != "weight")
    y = mix(x, scale, mask, clip=clip, unsigned=unsigned, ste=ste)
    y.backward(grad)
    assert y.stride() == x.stride(), "in the memory order of the input"
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), grad_x, rtol=1e-6)
    if kind != "weight":
        assert scale.grad.item() == pytest.approx(grad_scale, rel=1e-4)


@pytest.mark.parametrize(("kind", "mask", "clip", "unsigned", "ste"), CASES)
def test_the_same_numbers_as_torch(
    kind: str, mask: Any, clip: float | None, unsigned: bool, ste: bool, reference: Any
) -> None:
    def run() -> tuple[Tensor, Tensor | None]:
        x, scale, drawn, grad = operands(kind, mask)
        y = mix(x.requires_grad_(), scale, drawn, clip=clip, unsigned=unsigned, ste=ste)
        y.backward(grad)
        return y.detach(), x.grad

    ours = run()
    reference()
    theirs = run()
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("kind", ["images", "images, channels last"])
def test_a_gradient_in_another_memory_order_is_the_same(kind: str, order: torch.memory_format, reference: Any) -> None:
    def run() -> tuple[Tensor | None, Tensor | None]:
        x, scale, drawn, grad = operands(kind, "drawn")
        x, scale = x.requires_grad_(), scale.requires_grad_()
        mix(x, scale, drawn, clip=1.5, ste=True).backward(grad.contiguous(memory_format=order))
        return x.grad, scale.grad

    ours = run()
    reference()
    theirs = run()
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ste", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
def test_the_memory_order_of_images_does_not_matter(unsigned: bool, ste: bool) -> None:
    results = []
    for kind in ("images", "images, channels last"):
        x, scale, mask, grad = operands(kind, "drawn")
        y = mix(x.requires_grad_(), scale.requires_grad_(), mask, clip=1.5, unsigned=unsigned, ste=ste)
        y.backward(grad)
        results.append((y.detach(), x.grad, scale.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["inputs", "images", "images, channels last", "inputs of four axes"])
def test_nan_stays_nan_where_soft_and_is_a_level_where_frozen(kind: str) -> None:
    x, scale, mask, _ = operands(kind, "drawn")
    x[0] = float("nan")
    y = mix(x, scale, mask, clip=1.5)
    assert torch.equal(y[0].isnan(), ~mask.expand(x.shape[1:]))


@pytest.mark.parametrize("kind", ["inputs", "images", "images, channels last", "inputs of four axes"])
def test_the_same_sums_on_any_number_of_threads(kind: str) -> None:
    threads = torch.get_num_threads()
    gradients = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            x, scale, mask, grad = operands(kind, "drawn")
            mix(x, scale.requires_grad_(), mask, clip=1.5).backward(grad)
            gradients.append(scale.grad.item())
    finally:
        torch.set_num_threads(threads)
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, scale, mask: (x[:, :2].contiguous(), scale, mask[:, :2].contiguous()),
        lambda x, scale, mask: (x.double(), scale.double(), mask),
        lambda x, scale, mask: (x.bfloat16(), scale, mask),
        lambda x, scale, mask: (x.T, scale[:1], mask.T),
        lambda x, scale, mask: (x, scale.requires_grad_(), mask),
        lambda x, scale, mask: (x.to("meta"), scale.to("meta"), mask.to("meta")),
    ],
    ids=["few", "float64", "bfloat16", "transposed", "gradients of many scales", "meta"],
)
def test_the_rest_is_left_to_torch(change: Any) -> None:
    x, scale, mask, _ = operands("weight", "drawn")
    x, scale, mask = change(x, scale, mask)
    assert not (mixing.fits(x) and mixing.fits_with(x, scale, None, mask))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("images", lambda x, scale, mask: (x[:, :, :, :16], scale, mask)),
        ("images", lambda x, scale, mask: (x.transpose(2, 3), scale, mask)),
        ("images", lambda x, scale, mask: (x, scale.expand(12).reshape(12, 1, 1), mask)),
        ("images", lambda x, scale, mask: (x, scale, mask.expand(12, 16, 17))),
        ("images", lambda x, scale, mask: (x, scale, mask[:1])),
        ("images, channels last", lambda x, scale, mask: (x, scale, torch.ones(17, dtype=torch.bool))),
        ("images, channels last", lambda x, scale, mask: (x, scale, mask.expand(x.shape).contiguous())),
        ("images, channels last", lambda x, scale, mask: (x[:, :6], scale, mask[:6])),
        ("inputs of four axes", lambda x, scale, mask: (x.permute(0, 2, 3, 1), scale, mask)),
    ],
    ids=[
        "cut",
        "transposed",
        "a scale for each channel",
        "mask of pixels",
        "one for all channels",
        "channels last with a mask of columns",
        "channels last with a mask of entries",
        "some channels",
        "permuted tokens",
    ],
)
def test_other_images_are_left_to_torch(kind: str, change: Any) -> None:
    x, scale, mask, _ = operands(kind, "drawn")
    assert mixing.fits(x) and mixing.fits_with(x, scale, None, mask)
    x, scale, mask = change(x, scale, mask)
    assert not (mixing.fits(x) and mixing.fits_with(x, scale, None, mask))


@pytest.mark.parametrize(("value", "result"), [("reference", "reference"), ("cpu", "cpu"), ("gpu", "ValueError")])
def test_the_environment_chooses(value: str, result: str) -> None:
    code = "from hf_stompp import kernels; print(kernels.backend())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(HF_STOMPP_KERNELS=value), capture_output=True, text=True
    )
    assert result in (done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1])
    assert "HF_STOMPP_KERNELS is 'gpu'; allowed: cpu, triton, reference" in done.stderr or value != "gpu"


def test_without_numba_torch_does_it() -> None:
    code = (
        "import importlib.util as u; real = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'numba' else real(name, *a); "
        "from hf_stompp import kernels; print(kernels.backend())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "reference"


def _environment(**changes: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "HF_STOMPP_KERNELS"} | changes


def test_torch_keeps_its_threads() -> None:
    code = (
        "import torch; torch.set_num_threads(1); from hf_stompp.functional import mix; "
        "mix(torch.randn(300, 300), torch.ones(1), True, clip=2.0); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = (
        "import multiprocessing, torch; torch.set_num_threads(2); from hf_stompp.functional import mix\n"
        "def run(): mix(torch.randn(300, 300), torch.ones(1), True, clip=2.0)\n"
        "run(); child = multiprocessing.get_context('fork').Process(target=run); child.start(); child.join(60)\n"
        "print(child.exitcode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "0", done.stderr


def test_a_numba_that_does_not_work_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0')")
    code = "from hf_stompp import kernels; print(kernels.backend())"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(PYTHONPATH=path), capture_output=True, text=True
    )
    assert done.stdout.strip() == "reference" and "does not work (Numba needs NumPy 1.0)" in done.stderr
    environment = _environment(PYTHONPATH=path, HF_STOMPP_KERNELS="cpu")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ImportError: HF_STOMPP_KERNELS=cpu needs a numba that works" in done.stderr


def test_many_threads_are_no_more_than_the_processors() -> None:
    threads, before = torch.get_num_threads(), threading.active_count()
    try:
        torch.set_num_threads(16)
        for rows in (30, 40, 50, 60):
            mix(torch.randn(rows, 3000), torch.ones(1), True, clip=2.0)
    finally:
        torch.set_num_threads(threads)
    assert threading.active_count() - before <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no interval timers on this system")
def test_an_interrupt_waits_for_the_threads() -> None:
    """They would write into memory that is somebody else's by then."""
    in_threads = kernels.loaded("threads").in_threads

    done: list[int] = []

    def work(start: int, stop: int) -> None:
        time.sleep(0.5)
        done.append(start)

    def interrupt(*_: object) -> None:
        raise TimeoutError("too long")

    threads, before = torch.get_num_threads(), signal.signal(signal.SIGALRM, interrupt)
    try:
        torch.set_num_threads(2)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(TimeoutError, match="too long"):
            in_threads(work, 2, 2)
        assert sorted(done) == [0, 1]
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGALRM, before)


def test_what_is_compiled_of_other_files_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text("1")
    (tmp_path / "two.py").write_text("2")
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "__init__.py"))
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    folders = [compiling.folder()]
    assert tmp_path in folders[0].parents and folders[0] == compiling.folder()
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f"changed {name}")
        folders.append(compiling.folder())
    with monkeypatch.context() as other:
        other.setattr(numba.config, "CPU_FEATURES", "+avx512f")
        assert compiling.folder() not in folders
    assert len(set(folders)) == 3
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "chosen"))
    assert compiling.folder() == tmp_path / "chosen" / folders[-1].name
    with compiling._alone():
        assert numba.config.CACHE_DIR == str(tmp_path / "chosen" / folders[-1].name)
    assert numba.config.CACHE_DIR == str(tmp_path / "chosen")


@pytest.mark.parametrize("place", ["a file", "a file/below", "a folder for reading"])
def test_where_nothing_can_be_written_the_next_place_is_taken(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numba = pytest.importorskip("numba")
    (tmp_path / "a file").touch()
    (tmp_path / "a folder for reading").mkdir()
    access = os.access  # of the superuser, who may write anywhere, in a container
    monkeypatch.setattr(os, "access", lambda path, mode: "reading" not in str(path) and access(path, mode))
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "a folder for reading" / "compiling.py"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / place))
    monkeypatch.setattr("numba.misc.appdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "of user"))
    assert compiling.folder().parent == tmp_path / "of user"


def test_a_process_that_is_stopped_while_it_compiles_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "_LONGEST", 0.2)
    lock = compiling.folder() / ".lock"
    with compiling._alone(), pytest.raises(Timeout):
        FileLock(lock, timeout=0.1).acquire()
    with FileLock(lock), compiling._alone():
        pass  # after waiting


@pytest.mark.parametrize("shape", [(20_000,), (40, 500)])
def test_operands_that_are_views_and_masks_that_are_not_of_bools(shape: tuple[int, ...], reference: Any) -> None:
    x, shift = torch.randn(shape), torch.randn(2 * shape[-1])[::2]
    masks = torch.rand(2 * shape[-1])[::2] < 0.5, torch.tensor(True).expand(shape[-1:])
    arguments = [(mask, {"shift": shift}) for mask in masks]
    scale = torch.tensor([0.7]).expand(shape[0], 1) if len(shape) == 2 else torch.tensor(0.7)
    arguments += [(masks[0], {})]
    found = [mix(x, scale, mask, clip=1.5, **more) for mask, more in arguments]
    assert not mixing.fits_with(x, scale, None, torch.ones(shape[-1:], dtype=torch.uint8))
    reference()
    assert all(
        torch.equal(one, mix(x, scale, mask, clip=1.5, **more))
        for one, (mask, more) in zip(found, arguments, strict=True)
    )


# --- the shift, and scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "weight"])
@pytest.mark.parametrize("mask", [True, False, "drawn"])
@pytest.mark.parametrize(("clip", "ste"), [(1.5, True), (1.5, False), (None, True)])
def test_a_shift_is_taken_off_first(kind: str, mask: Any, clip: float | None, ste: bool, backend: str) -> None:
    x, scale, mask, grad = operands(kind, mask)
    axis = 1 if "images" in kind else x.dim() - 1
    shift = torch.randn(x.shape[axis], generator=torch.Generator().manual_seed(1)) / 3
    shift = shift.view(-1, 1, 1) if axis == 1 else shift
    results = []
    with kernels.use(backend):
        for inside in (True, False):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, scale, shift)]
            value = leaves[0] if inside else leaves[0] - leaves[2]
            y = mix(value, leaves[1], mask, clip=clip, ste=ste, shift=leaves[2] if inside else None)
            y.backward(grad)
            results.append((y, [leaf.grad for leaf in leaves]))
    (ours, our_grads), (theirs, their_grads) = results
    assert torch.equal(ours, theirs)
    assert torch.equal(our_grads[0], their_grads[0])
    assert torch.allclose(our_grads[1], their_grads[1], rtol=1e-4, atol=1e-3)
    others = [a for a in range(x.dim()) if a != axis]
    expected = -our_grads[0].double().sum(dim=others).view(shift.shape)
    assert torch.allclose(our_grads[2].double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_of_what_is_shifted() -> None:
    x, scale, _, _ = operands("inputs", True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mix(x.requires_grad_(), scale, True, clip=1.0, ste=True, shift=torch.zeros(x.shape[-1]))
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()} == {x.data_ptr()}


@pytest.mark.parametrize("shape", [(96, 200), (3, 70000), (70000, 1), (1, 20000)])
def test_row_means(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert mixing.fits(x)
    expected = np.abs(x.double().numpy()).mean(axis=1)
    np.testing.assert_allclose(mixing.row_means(x).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(weight_scale(x, "channel").flatten().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("shape", "shift_shape"),
    [
        ((8, 16, 150), ()),
        ((8, 16, 150), (1,)),
        ((8, 16, 150), (16, 1)),
        ((8, 16, 150), (16, 150)),
        ((64, 32, 40), (64, 1, 1)),  # an image without a batch
        ((4, 6, 90, 90), (90,)),
        ((4, 6, 90, 90), (1, 6, 1, 1)),
        ((700, 120), (700, 1)),
    ],
)
def test_a_shift_of_any_shape(shape: tuple[int, ...], shift_shape: tuple[int, ...], backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, shift = torch.randn(shape, generator=generator), torch.randn(shift_shape, generator=generator)
    scale = torch.tensor([0.7])
    with kernels.use(backend):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, shift)]
        y = mix(leaves[0], scale, True, clip=1.5, ste=True, shift=leaves[1])
        y.sum().backward()
    np.testing.assert_array_equal(y.detach().numpy(), np.where(x.numpy() - shift.numpy() >= 0, 0.7, -0.7).astype("f4"))
    inside = (np.abs(x.numpy() - shift.numpy()) <= np.float32(1.5) * np.float32(0.7)).astype(float)
    np.testing.assert_allclose(leaves[0].grad.numpy(), inside)
    assert leaves[1].grad.shape == shift.shape
    np.testing.assert_allclose(leaves[1].grad.sum(), -inside.sum(), rtol=1e-5)
