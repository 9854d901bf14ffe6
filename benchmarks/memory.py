"""What a process takes that serves one request of 128 tokens with a packed BERT-base, and which part of it is imports.

    python benchmarks/memory.py

Each row is a process of its own: first imports, each with those above it, then requests. Figures are its peak (VmHWM,
on Linux) less that of one that has only imported torch; medians. Compiling is done before. Weights are random. Writes
`benchmarks/results/memory.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sizes import machine, save

STEPS = {
    "torch": "import torch",
    "transformers": "from transformers import BertForSequenceClassification",
    "hf_stompp": "import hf_stompp",
    "numba": "import numba",
    "its kernels": "from hf_stompp import kernels; kernels.backend()",
}
REQUEST = """
with torch.inference_mode():
    model = BertForSequenceClassification.from_pretrained(sys.argv[1])
    model(input_ids=torch.randint(model.config.vocab_size, (1, 128)))
"""
EMBEDDINGS = (32, 1)
"""Bits of an embedding's entries: of the largest packed file, and of the smallest."""


def peak(code: str, backend: str, *args: str) -> float:
    """MB at most of a process that runs the code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"HF_STOMPP_KERNELS": backend, "OMP_NUM_THREADS": "1"}
    code = f"import sys\n{code}\nprint(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return next(int(line.split()[1]) * 1024 / 1e6 for line in done.stdout.splitlines() if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each row; medians count")
    args = parser.parse_args()
    code, runs = "", {}
    for name, step in STEPS.items():
        code += step + "\n"
        runs[name] = code, "cpu", ()
    with tempfile.TemporaryDirectory() as scratch:
        served = "\n".join(list(STEPS.values())[:3]) + REQUEST
        for bits in EMBEDDINGS:
            folder = Path(scratch, str(bits))
            file = save(f"W1A1, {bits}-bit embeddings", folder)["file_bytes"] / 1e6
            for backend in ("cpu", "reference"):
                runs[f"a request, file of {file:.0f} MB, backend {backend}"] = (
                    served,
                    backend,
                    (str(folder / "model"),),
                )
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(args.rounds + 1):  # the first compiles
            for name, (code, backend, arguments) in runs.items():
                print(f"round {round_} of {args.rounds}: {name}", file=sys.stderr)
                samples[name].append(peak(code, backend, *arguments))
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    print("| | MB over torch alone |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value - medians['torch']:.0f} |")
    result = {**machine(), "rounds": args.rounds, "peak_mb": medians}
    Path(__file__).with_name("results").joinpath("memory.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
