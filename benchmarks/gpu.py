"""How fast packed linear layers are on a GPU, beside what else runs them there.

    python benchmarks/gpu.py

The linear layers of a BERT-base, as in `inference.py`. The table gives the time of the layer with 1-bit weights and
inputs, which come and go in float16, and how many times as long the others take: torch's layer in float16 and
bfloat16, and the product of two int8 matrices alone (`torch._int_mm`, which takes more than 16 rows), without what
makes them of floats and floats of the sums. All are medians of the time on the device, with nothing in its second
cache; variants take turns. Weights are random: speed only. What the layer gives is compared with float64 first. Writes
`benchmarks/results/gpu.json`.
"""

import json
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_stompp.layers import PackedLinear
from hf_stompp.packing import pack_signs

RESULTS = Path(__file__).with_name("results")
LINEARS = ((768, 768), (768, 3072), (3072, 768))
ROWS = (1, 8, 32, 128, 512, 4096)
ROUNDS = 5


def main() -> None:
    if not torch.cuda.is_available():
        fail("torch sees no CUDA device, and this measures layers on one")
    if find_spec("triton") is None:
        fail("the kernel is in Triton, which is not installed: pip install triton")
    torch.manual_seed(0)
    found: dict[str, Any] = versions()
    print(", ".join(found.values()))
    found["rows"] = []
    for features, outputs in LINEARS:
        for rows in ROWS:
            with torch.no_grad():
                times = measure(variants(rows, features, outputs))
            found["rows"].append({"rows": rows, "features": features, "outputs": outputs, **times})
            show(found["rows"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")


def fail(reason: str) -> None:
    print(f"benchmarks/gpu.py: {reason}.", file=sys.stderr)
    sys.exit(2)


def versions() -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "cuda": f"CUDA {torch.version.cuda}",
        "torch": f"torch {torch.__version__}",
        "triton": f"triton {triton.__version__}",
    }


def variants(rows: int, features: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    from hf_stompp.kernels import gpu

    plain = nn.Linear(features, outputs, device="cuda")
    packed = PackedLinear.empty(plain, binary_input=True)
    packed.weight.copy_(pack_signs(plain.weight))
    packed.weight_scale.uniform_(0.5, 1.5)
    packed.activation_threshold.normal_(std=0.3)
    packed.activation_levels.copy_(torch.tensor([-0.7, 0.7]))
    x = torch.randn(rows, features, device="cuda")

    def layer(x: Tensor) -> Tensor:
        return gpu.linear(x, packed.operands())

    in_float64 = packed.binary_input(x).double() @ packed.dequantized_weight().double().T + packed.bias.double()
    torch.testing.assert_close(layer(x).double(), in_float64, rtol=1e-5, atol=1e-5)

    half, bfloat = (nn.Linear(features, outputs, device="cuda", dtype=d) for d in (torch.float16, torch.bfloat16))
    half_x, bfloat_x = x.half(), x.bfloat16()
    packed.half()
    made = {"packed": lambda: layer(half_x), "fp16": lambda: half(half_x), "bf16": lambda: bfloat(bfloat_x)}
    if rows > 16:
        a, b = (torch.randint(-127, 128, (n, features), device="cuda", dtype=torch.int8) for n in (rows, outputs))
        made["int8"] = lambda: torch._int_mm(a, b.T)
    return made


def measure(variants: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Name → median seconds."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, run in variants.items():
            times[name].append(do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def show(rows: list[dict[str, Any]]) -> None:
    """The last row, and before the first one a heading."""
    if len(rows) == 1:
        print("| rows x K x N | W1A1 µs | fp16 | bf16 | int8 |\n|---|---|---|---|---|")
    row = rows[-1]
    others = [f"{row[name] / row['packed']:.2f}x" if name in row else "" for name in ("fp16", "bf16", "int8")]
    name = f"{row['rows']} x {row['features']} x {row['outputs']}"
    print("| " + " | ".join([name, f"{row['packed'] * 1e6:.1f}", *others]) + " |", flush=True)


if __name__ == "__main__":
    main()
