"""How fast packed layers and models are on a CPU, beside what else runs them there.

    python benchmarks/inference.py layers         # BERT-base's linear layers and ResNet-50's convolutions
    python benchmarks/inference.py models         # BERT-base, MiniLM-L6, ResNet-18 and 50
    python benchmarks/inference.py models --threads 2 --quick

All variants of a row run in turn, round by round in one process, so that a machine whose speed drifts slows all of
them alike. The tables give the median time of W1A1, and the medians of the ratios to it, round by round. Times are
processor time of one thread, or with several threads wall time. Weights are random: speed only. glibc is told to keep
the memory that it has, for all of them: else most of a large result is the system's work of finding memory. Writes
`benchmarks/results/inference_KIND_THREADS.json`, and for models a chart beside it; until all rows are there, a
`….partial.json`.

*of the limit* is how much of the processor's own limit a layer reaches: of the rate of xor, population count and
addition in the kernel's innermost loop on data in the first cache, which is measured in each round too.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.utils import logging

from hf_stompp import BinarizationConfig, binarize, pack
from hf_stompp.fusion import fuse
from hf_stompp.kernels.blocks import WIDTH
from hf_stompp.kernels.processor import inputs_of_tile, popcount_of_processor
from hf_stompp.kernels.vectors import popcount_tile
from hf_stompp.layers import PackedConv2d, PackedLinear
from hf_stompp.packing import pack_signs
from hf_stompp.patching import binary_layers, packed_layers

RESULTS = Path(__file__).with_name("results")
LINEARS = ((768, 768), (768, 3072), (3072, 768))
ROWS = (1, 8, 32, 128, 512, 4096)
# Channels, outputs, pixels of a side, kernel: of the binary convolutions of a ResNet-50 at 224 pixels.
CONVOLUTIONS = (
    *((64, 64, 56, 3), (256, 64, 56, 1), (64, 256, 56, 1), (128, 128, 28, 3), (512, 128, 28, 1), (128, 512, 28, 1)),
    *(
        (256, 256, 14, 3),
        (1024, 256, 14, 1),
        (256, 1024, 14, 1),
        (512, 512, 7, 3),
        (2048, 512, 7, 1),
        (512, 2048, 7, 1),
    ),
)
Variants = dict[str, Callable[[], Any]]
PAUSE = 0.05
"""Seconds in which the threads of the variant before come to rest."""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("layers", "models"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    args = parser.parse_args()
    if os.environ.keys().isdisjoint(MEMORY):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    getLogger().setLevel(ERROR)  # onnxruntime gives advice
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"inference_{args.kind}_{args.threads}.json"
    so_far = path.with_suffix(".partial.json")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for row in (layers if args.kind == "layers" else models)(args):
            rows.append(row)
            show(row, rows[-2] if len(rows) > 1 else None)
            measured = {"processor": processor(), "threads": args.threads, "rows": rows}
            so_far.write_text(json.dumps(measured, indent=2) + "\n")
    so_far.replace(path)
    if args.kind == "models":
        chart(rows, path.with_suffix(".svg"))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "unknown"
    return f"{name} ({popcount_of_processor()}), {os.cpu_count()} cores, torch {torch.__version__}"


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(variants: Variants, threads: int, rounds: int, seconds: float) -> dict[str, float]:
    """Name → median seconds, and `name/W1A1` → median of the ratio to that one."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, run in variants.items():
        run()  # what is compiled or laid out at first
        start = clock()
        run()
        repeats[name] = max(1, min(1000, int(seconds / max(clock() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            if threads > 1:  # onnxruntime's wait for their next work without rest, for a while
                time.sleep(PAUSE)
                run()
            start = clock()
            for _ in range(repeats[name]):
                run()
            times[name].append((clock() - start) / repeats[name])
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        found[f"{name}/W1A1"] = statistics.median(a / b for a, b in zip(values, times["W1A1"], strict=True))
    return found


TILE = inputs_of_tile()
MULTIPLICATIONS = 2000 * TILE * WIDTH * 32 * 96


@functools.cache
def innermost_loop() -> Callable[[], None]:
    """Does so many multiplications in the kernel's innermost loop, on data in the first cache."""
    tile, words = popcount_tile(TILE, False), 96
    panel, x = (torch.zeros(n, words, dtype=torch.int32) for n in (WIDTH, TILE))
    offsets, floats, out = torch.zeros(WIDTH, dtype=torch.int32), torch.zeros(WIDTH), torch.zeros(TILE, WIDTH)
    places = np.full(TILE, offsets.data_ptr())

    @numba.njit
    def run(times, x, panel, words, places, floats, out):  # type: ignore[no-untyped-def]
        for _ in range(times):
            tile(x, words, panel, words, places, floats, floats, floats, np.int32(2), out, 64, 0)

    return lambda: run(
        2000, x.data_ptr(), panel.data_ptr(), words, places.ctypes.data, floats.data_ptr(), out.data_ptr()
    )


def show(row: dict[str, Any], before: dict[str, Any] | None) -> None:
    """A row of a table; a heading, if it has not the columns of the one before."""

    def heads(row: dict[str, Any]) -> list[str]:
        return ["", "W1A1 ms", *(key for key in COLUMNS if key in row), *(["of the limit"] if "share" in row else [])]

    if before is None or heads(before) != heads(row):
        print("\n| " + " | ".join(heads(row)) + " |\n|" + "---|" * len(heads(row)))
    milliseconds = row["W1A1"] * 1e3
    cells = [row["name"], f"{milliseconds:.3f}" if milliseconds < 1 else f"{milliseconds:.1f}"]
    cells += [f"{row[f'{key}/W1A1']:.1f}" for key in COLUMNS if key in row]
    cells += [f"{row['share']:.0%}"] if "share" in row else []
    print("| " + " | ".join(cells) + " |", flush=True)


COLUMNS = ("fp32", "bf16", "int8", "onnx fp32", "onnx int8", "W1A32", "W1A1 bf16", "layers free")


# --- layers ---------------------------------------------------------------------------------------------------------


def layers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for features, outputs in LINEARS:
        for m in ROWS[::2] if args.quick else ROWS:
            yield layer(args, f"{m} x {features} x {outputs}", linears(m, features, outputs), m * features * outputs)
    for channels, outputs, size, kernel in CONVOLUTIONS[::3] if args.quick else CONVOLUTIONS:
        name = f"{channels} → {outputs}, {kernel}x{kernel}, {size}x{size}"
        work = channels * outputs * size**2 * kernel**2
        yield layer(args, name, convolutions(channels, outputs, size, kernel), work)


def layer(args: argparse.Namespace, name: str, variants: Variants, work: int) -> dict[str, Any]:
    found = measure(variants | {"limit": innermost_loop()}, args.threads, 5 if args.quick else 15, 0.02)
    share = work / found["W1A1"] * found["limit"] / MULTIPLICATIONS / args.threads
    return {"name": name, **found, "share": share}


def linears(rows: int, features: int, outputs: int) -> Variants:
    x, plain = torch.randn(rows, features), nn.Linear(features, outputs)
    binary, weights = (PackedLinear.empty(plain, binary_input) for binary_input in (True, False))
    for layer in (binary, weights):
        layer.weight.copy_(pack_signs(plain.weight))
    half, half_x = copy.deepcopy(plain).bfloat16(), x.bfloat16()
    quantized = dynamic_int8(plain)
    return {
        "W1A1": lambda: binary(x),
        "W1A32": lambda: weights(x),
        "fp32": lambda: plain(x),
        "bf16": lambda: half(half_x),
        "int8": lambda: quantized(x),
        **onnx(plain, (x,)),
    }


def convolutions(channels: int, outputs: int, size: int, kernel: int) -> Variants:
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    plain = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
    packed, weights = (PackedConv2d.empty(plain, binary_input) for binary_input in (True, False))
    for one in (packed, weights):
        one.weight.copy_(pack_signs(PackedConv2d._as_rows(plain.weight)))
    plain = plain.to(memory_format=torch.channels_last)
    half, half_x = copy.deepcopy(plain).bfloat16(), x.bfloat16()
    return {
        "W1A1": lambda: packed(x),
        "W1A32": lambda: weights(x),
        "fp32": lambda: plain(x),
        "bf16": lambda: half(half_x),
        **onnx(plain, (x,), quantize=False),
    }


def dynamic_int8(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(module)), {nn.Linear}, torch.qint8)


def onnx(module: nn.Module, inputs: tuple[Tensor, ...], quantize: bool = True) -> Variants:
    """The module in onnxruntime, in float32 and dynamically quantized; nothing where that is not installed. It has no
    dynamic quantization of convolutions that is fast."""
    try:
        import onnxruntime
        from onnxruntime.quantization import quantize_dynamic
    except ImportError:
        return {}
    variants: Variants = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        names = [f"x{i}" for i in range(len(inputs))]
        torch.onnx.export(module, inputs, path, input_names=names, dynamo=False, verbose=False)
        files = {"onnx fp32": path}
        if quantize:
            files["onnx int8"] = Path(folder) / "int8.onnx"
            quantize_dynamic(path, files["onnx int8"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        fed = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        for name, file in files.items():
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            variants[name] = lambda session=session: session.run(None, fed)
    return variants


# --- models ---------------------------------------------------------------------------------------------------------


class Nothing(nn.Module):
    """A layer that costs nothing after its first call: what is left of a model when they all do is the limit of any
    kernel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.kept = layer, {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.kept:
            self.kept[x.shape] = self.layer(x)
        return self.kept[x.shape]


def models(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, model, inputs, rounds in cases(args.quick):
        yield {"name": name, **measure(whole(model, inputs), args.threads, rounds, 0.05)}


def cases(quick: bool) -> Iterator[tuple[str, PreTrainedModel, dict[str, Tensor], int]]:
    """Name, full-precision model, inputs, rounds."""
    small = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    for name, config in (("BERT-base", BertConfig()), ("MiniLM-L6", BertConfig(**small))):
        model = BertForSequenceClassification(config).eval()
        for batch in (1,) if quick else (1, 32):
            for length in (128,) if quick else (16, 128, 384):
                ids = torch.randint(1000, (batch, length))
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                yield f"{name}, {batch} x {length}", model, inputs, 5 if batch == 1 and not quick else 3
    for name, config in (
        ("ResNet-18", ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")),
        ("ResNet-50", ResNetConfig()),
    ):
        model = ResNetForImageClassification(config).eval().to(memory_format=torch.channels_last)
        pixels = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        yield f"{name}, 1 x 224²", model, {"pixel_values": pixels}, 5


def whole(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Variants:
    def halved(model: PreTrainedModel) -> Callable[[], Any]:
        half = copy.deepcopy(model).bfloat16()
        fuse(half)
        half_inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
        return lambda: half(**half_inputs)

    packed, weights = packed_model(model), packed_model(model, activations=False)
    free = copy.deepcopy(packed)
    for name, one in packed_layers(free).items():
        free.set_submodule(name, Nothing(one))
    variants = {
        "W1A1": lambda: packed(**inputs),
        "W1A1 bf16": halved(packed),
        "W1A32": lambda: weights(**inputs),
        "fp32": lambda: model(**inputs),
        "bf16": halved(model),
        "layers free": lambda: free(**inputs),
    }
    text = "input_ids" in inputs
    if text:
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
        variants["int8"] = lambda: quantized(**inputs)
    return variants | onnx(Positional(model, list(inputs)).eval(), tuple(inputs.values()), quantize=text)


class Positional(nn.Module):
    """The logits of a model that takes its inputs by position, as exporters do."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


@torch.no_grad()
def packed_model(model: PreTrainedModel, **config: Any) -> PreTrainedModel:
    latent = binarize(copy.deepcopy(model), BinarizationConfig(**config))
    for one in binary_layers(latent).values():
        one.set_frozen(1.0, step=0)
        if one.activation_shift is not None:  # as after training: another one for each layer
            one.activation_shift.copy_(torch.randn_like(one.activation_shift) / 10)
    packed = pack(latent)
    fuse(packed)
    return packed


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of how many times faster than float32 each variant is; nothing where matplotlib is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no chart: pip install matplotlib")
        return
    names = [name for name in ("bf16", "int8", "onnx int8", "W1A32", "W1A1") if any(name in row for row in rows)]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.55 * len(rows)))
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [row["fp32"] / row[name] if name in row else 0 for row in rows]
        axes.barh([i + height * place for i in range(len(rows))], values, height=height, label=name)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch in float32")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
