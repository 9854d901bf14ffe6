"""Which backend computes, what says so, and how its kernels are compiled."""

import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from hf_stompp import kernels
from hf_stompp.kernels import compiling
from hf_stompp.layers import PackedConv2d, PackedLinear

pytest.importorskip("numba", reason="the extra `fast` is not installed: there are no kernels to test")


def test_the_backend_can_be_chosen_for_a_while() -> None:
    with kernels.use("reference"):
        assert kernels.backend() == "reference" and "backend: reference" in kernels.info()
        with kernels.use("cpu"):
            assert kernels.backend() == "cpu" and "population count" in kernels.info()
        assert kernels.backend() == "reference"
    with kernels.use("cpu"), kernels.use("reference"):
        with kernels.use("cpu"):
            pass
        assert kernels.backend() == "reference"
        if importlib.util.find_spec("triton"):
            with kernels.use("triton"):
                assert kernels.backend() == "reference"
    with pytest.raises(ValueError, match="the backend is 'gpu'; allowed: cpu, triton, reference"), kernels.use("gpu"):
        pass


def test_a_layer_says_what_computes_it() -> None:
    layer, grouped = nn.Linear(40, 70), nn.Conv2d(4, 4, 3, groups=2)
    for backend in ("cpu", "reference"):
        with kernels.use(backend):
            assert f"input_bits=1, backend={backend}" in repr(PackedLinear.empty(layer, True))
            assert f"input_bits=32, backend={backend}" in repr(PackedLinear.empty(layer, False))
            assert "backend=reference" in repr(PackedLinear.empty(layer, True).to("meta"))
            assert "backend=reference" in repr(PackedConv2d.empty(grouped, True))


WITHOUT_COMPILING = """
import torch
from torch import nn
from hf_stompp import kernels
from hf_stompp.layers import PackedLinear

print([repr(PackedLinear.empty(nn.Linear(3, 4), binary)) for binary in (True, False)], kernels._found.cache_info())
print(kernels.info() if {with_info} else "")
"""


@pytest.mark.parametrize(
    ("asked", "broken", "layers", "info"),
    [
        ("", False, "backend=cpu", None),
        ("gpu", False, "backend=none, for HF_STOMPP_KERNELS is wrong", "backend: none: HF_STOMPP_KERNELS is 'gpu'"),
        ("", True, "backend=reference", "numba: installed, but does not work"),
        ("cpu", True, "backend=reference", "backend: none: HF_STOMPP_KERNELS=cpu needs a numba that works"),
    ],
)
def test_what_says_what_computes_a_layer_neither_compiles_nor_raises(
    asked: str, broken: bool, layers: str, info: str | None, tmp_path: Path
) -> None:
    if broken:
        (tmp_path / "numba.py").write_text("raise ImportError('it is for another numpy')")
    code = WITHOUT_COMPILING.format(with_info=info is not None)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {**os.environ, "HF_STOMPP_KERNELS": asked, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(layers) == 2 and "currsize=0" in done.stdout and (info or "") in done.stdout, done.stdout


def test_a_compilation_that_takes_long_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compiling.logger, "warning_once", said.append)
    monkeypatch.setattr(compiling, "_PATIENCE", 0.01)
    with compiling.announced():
        for _ in range(500):
            if said:
                break
            time.sleep(0.01)
    assert said == ["Compiling the bit kernels, once for this machine: half a minute."]
    monkeypatch.setattr(compiling, "_PATIENCE", 60.0)
    with compiling.announced():
        pass
    assert len(said) == 1


FIRST_CALL = """
import torch
from torch import nn
from hf_stompp.layers import PackedConv2d, PackedLinear

with torch.no_grad():
    torch.manual_seed(0)
    y = [PackedLinear.empty(nn.Linear(100, 70), binary)(torch.randn(9, 100)) for binary in (True, False)]
    y.append(PackedConv2d.empty(nn.Conv2d(3, 5, 3), True)(torch.randn(1, 3, 8, 8)))
print([one.double().sum().item() for one in y])
"""


@pytest.mark.slow
def test_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    """Each says so, all compute the same, and one does the work: the others and the next one read what it left."""
    environment = {**os.environ, "HF_STOMPP_KERNELS": "cpu", "NUMBA_CACHE_DIR": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FIRST_CALL]
        debug = {"NUMBA_DEBUG_CACHE": "1"}
        return subprocess.Popen(
            command, env=environment | debug, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(process: subprocess.Popen[str]) -> tuple[str, int, str]:
        """What it computed, how many kernels it compiled, and what it said."""
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        return out.splitlines()[-1], out.count("data saved to"), errors

    first = [end(process) for process in [start() for _ in range(3)]]
    result, compiled, errors = end(start())
    assert {result} == {one for one, _, _ in first} and compiled == 0 and "Compiling" not in errors
    assert all("Compiling the bit kernels" in said for _, _, said in first)
    assert sorted(number > 0 for _, number, _ in first) == [False, False, True]


OTHER_PROCESSOR = """
import numpy as np, torch
from torch import nn
from hf_stompp import kernels
from hf_stompp.layers import PackedLinear
from hf_stompp.packing import pack_signs

assert all(said in kernels.info() for said in {said}), kernels.info()
for rows, features, outputs in ((1, 1, 1), (7, 29, 70), (33, 200, 65), (18, 64, 130)):
    x, weight = torch.randn(rows, features), torch.randn(outputs, features)
    for binary in (True, False):
        layer = PackedLinear.empty(nn.Linear(features, outputs), binary)
        layer.weight.copy_(pack_signs(weight))
        signs = [np.where(values.numpy() >= 0, 1.0, -1.0) for values in (x, weight)]
        if binary:
            layer.activation_levels.copy_(torch.tensor([-1.0, 1.0]))
        inputs = signs[0] if binary else x.double().numpy()
        with torch.no_grad():
            error = np.abs(layer(x).numpy() - (inputs @ signs[1].T + layer.bias.numpy()))
        assert error.max() < 1e-4, (rows, features, outputs, binary, error.max())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="tells numba of an x86 processor")
@pytest.mark.parametrize(
    ("name", "features", "said"),
    [
        ("haswell", "avx,avx2,fma,bmi,bmi2,lzcnt,f16c,movbe", ("3 weights to a look-up", "AVX2 by tables")),
        pytest.param("nehalem", "", ("no AVX2", "what LLVM makes of it"), marks=pytest.mark.slow),
    ],
)
def test_a_processor_with_shorter_vectors(name: str, features: str, said: tuple[str, ...]) -> None:
    features = ",".join(f"+{one}" for one in f"sse,sse2,sse3,ssse3,sse4.1,sse4.2,popcnt,{features}".split(",") if one)
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "HF_STOMPP_KERNELS": "cpu"}
    code = OTHER_PROCESSOR.replace("{said}", repr(said))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
