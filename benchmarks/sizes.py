"""What a 1-bit BERT takes on disk and in memory: bert-base shapes, random weights, a classification head.

    python benchmarks/sizes.py

Every model is saved first, and then loaded in a fresh process in each round. A tiny model of the same kind has been
loaded and run there before, so that code imported on first use does not count as the model's. Memory is what the
resident set of that process (Rss of Linux's smaps_rollup) grows by. safetensors maps the file: its pages become
resident, as file-backed memory, when a tensor is first read, most of them in the first forward. What a forward leaves
of the process's own is mostly freed memory that the allocator keeps. Load times are of the processor.

BitNet and HQQ are those of transformers; a row that cannot be measured has the exception in place of figures.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BitNetQuantConfig, HqqConfig
from transformers import set_seed as seed_everything
from transformers.integrations.bitnet import BitLinear, pack_weights
from transformers.quantizers.auto import AutoHfQuantizer

from hf_stompp import BinarizationConfig, binarize, calibrate, pack
from hf_stompp.patching import binary_layers

TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128}
TOKENS = (1, 128)


def tokens(model: BertForSequenceClassification) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, TOKENS)


def save_float(model: BertForSequenceClassification, folder: Path, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(folder)


def save_packed(
    model: BertForSequenceClassification, folder: Path, embedding_bits: int, dtype: torch.dtype | None = None
) -> None:
    """As at the end of a training run, without the training."""
    binarize(model, BinarizationConfig(replace_gelu=True))
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    calibrate(model, {"input_ids": tokens(model)})
    pack(model, embedding_bits=embedding_bits, dtype=dtype).save_pretrained(folder)


@torch.no_grad()
def save_bitnet(model: BertForSequenceClassification, folder: Path) -> None:
    """By transformers' own layers and packing: its quantizer takes only checkpoints that are in BitNet's format."""
    # The format has four outputs a byte; the two of the head do not fill one.
    config = BitNetQuantConfig(modules_to_not_convert=["classifier"])
    floats = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    AutoHfQuantizer.from_config(config, pre_quantized=True).preprocess_model(model)
    for name, linear in floats.items():
        layer = model.get_submodule(name)
        if isinstance(layer, BitLinear):
            scale = 1 / linear.weight.abs().mean()
            layer.weight.copy_(pack_weights((linear.weight * scale).round().clamp(-1, 1)))
            layer.weight_scale.fill_(scale)
            layer.bias.copy_(linear.bias)
    model.config.quantization_config = config
    model.save_pretrained(folder)


def save_hqq(model: BertForSequenceClassification, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        quantized = BertForSequenceClassification.from_pretrained(source, quantization_config=HqqConfig(nbits=1))
    quantized.save_pretrained(folder)


METHODS: dict[str, Callable[[BertForSequenceClassification, Path], None]] = {
    "float32": partial(save_float, dtype=torch.float32),
    "float16": partial(save_float, dtype=torch.float16),
    **{f"W1A1, {bits}-bit embeddings": partial(save_packed, embedding_bits=bits) for bits in (32, 16, 8, 4, 1)},
    **{
        f"W1A1, {bits}-bit embeddings, rest float16": partial(save_packed, embedding_bits=bits, dtype=torch.float16)
        for bits in (8, 1)
    },
    "BitNetQuantConfig (1.58-bit weights)": save_bitnet,
    "HqqConfig (1-bit weights)": save_hqq,
}


def save(method: str, folder: Path) -> dict[str, Any]:
    """Saves the model and the tiny one; returns the bytes of the model's weights file."""
    for name, shapes in (("tiny", TINY), ("model", {})):
        seed_everything(0)
        METHODS[method](BertForSequenceClassification(BertConfig(**shapes)).eval(), folder / name)
    return {"file_bytes": sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))}


def load(folder: Path) -> dict[str, Any]:
    """Loads and runs the model in this process, after the tiny one."""
    imported = resident()
    run(BertForSequenceClassification.from_pretrained(folder / "tiny"))
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wall, processor = time.perf_counter(), time.process_time()
    model = BertForSequenceClassification.from_pretrained(folder / "model")
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    loaded = resident()
    run(model)
    after = resident()
    peak = read_kilobytes("status")["VmHWM"] - before["Rss"]
    return {
        "first_use_mb": before["Rss"] - imported["Rss"],
        "loaded_mb": loaded["Rss"] - before["Rss"],
        "forward_mb": after["Rss"] - before["Rss"],
        "forward_own_mb": after["Anonymous"] - before["Anonymous"],
        "peak_mb": peak,
        "load_seconds": processor,
        "load_wall_seconds": wall,
    }


@torch.inference_mode()
def run(model: BertForSequenceClassification) -> None:
    model(input_ids=tokens(model))


def resident() -> dict[str, float]:
    """MB of this process: all of it, and what is its own rather than a file's."""
    return read_kilobytes("smaps_rollup")


def read_kilobytes(file: str) -> dict[str, float]:
    """The fields of one of Linux's files about this process that are amounts of memory, in MB."""
    lines = (line.split() for line in Path("/proc/self", file).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 / 1e6 for words in lines if words[-1] == "kB"}


def child(folder: Path) -> dict[str, Any]:
    """What `load` returns in a fresh process."""
    # Settings of malloc in the environment would change what it gives back.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--load", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"the process ended with exit status {done.returncode}"}


def attempt(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `function` returns, or the exception that ends it, as its `error`."""
    try:
        return function(*args)
    except Exception as error:  # whatever a method of transformers raises is its row
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def measure(rounds: int) -> list[dict[str, Any]]:
    """All rows; each round loads every model in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        # What BitNet compiles is cached, from the first round to the others but not from run to run.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch, "inductor"))
        folders = {method: Path(scratch, str(number)) for number, method in enumerate(METHODS)}
        rows: dict[str, dict[str, Any]] = {}
        for method, folder in folders.items():
            print(f"saving: {method}", file=sys.stderr)
            rows[method] = {"model": method, **attempt(save, method, folder)}
        samples: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for round_ in range(rounds):
            for method in (method for method in METHODS if "error" not in rows[method]):
                print(f"round {round_ + 1} of {rounds}: {method}", file=sys.stderr)
                sample = child(folders[method])
                samples[method].append(sample)
                if "error" in sample:
                    rows[method] |= sample
    for method, row in rows.items():
        if "error" not in row:
            row |= {key: statistics.median(sample[key] for sample in samples[method]) for key in samples[method][0]}
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | file MB | loaded MB | after a forward MB | of that, the process's own | peak MB | load s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['error']} | | | | | |")
            continue
        lines.append(
            f"| {row['model']} | {row['file_bytes'] / 1e6:.1f} | {row['loaded_mb']:.1f} | {row['forward_mb']:.1f} "
            f"| {row['forward_own_mb']:.1f} | {row['peak_mb']:.0f} | {row['load_seconds']:.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    processor = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "hqq"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"processor": processor, "libc": " ".join(platform.libc_ver()), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes that load each model; medians count")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sizes.json"))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.load:
        print("\n" + json.dumps(attempt(load, args.load)))
        return
    rows = measure(args.rounds)
    print(table(rows))
    first_use = statistics.median(row["first_use_mb"] for row in rows if "error" not in row)
    print(f"\nNot counted: {first_use:.0f} MB that loading and running a first, tiny model adds to the process.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial_output = args.output.with_suffix(".partial")
    partial_output.write_text(json.dumps({**machine(), "rounds": args.rounds, "rows": rows}, indent=2) + "\n")
    partial_output.replace(args.output)


if __name__ == "__main__":
    main()
