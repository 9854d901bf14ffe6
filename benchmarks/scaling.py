"""How many samples a second one and two processes train, and what they send each other.

    python benchmarks/scaling.py                                          # MiniLM-L6 shapes, one thread a process
    torchrun --nproc_per_node 8 benchmarks/scaling.py --device cuda --model bert-base --batch 32x128 --bf16

Each process has its own batch, whose size does not depend on how many there are. The variants take turns, round by
round, in the same processes; a round is a whole optimizer step under DistributedDataParallel. Bytes are counted
where they are handed over: in DDP's hook for gradients, and of the buffers that it sends in each forward. Prints a
table, and the process of rank 0 writes `benchmarks/results/scaling_MODEL_DEVICE.json`, of one and of two processes if
it was started as in the first line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training import MODELS, Variant

NAMES = ("full precision", "STE baseline", "StoMPP + STE", "StoMPP STE-free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm-l6")
    parser.add_argument("--batch", default="8x64", help="of each process: size x sequence length")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        print("| processes | variant | samples/s | of one process | vs full precision | gradients MB | buffers MB |")
        print("|---|---|---|---|---|---|---|")
        for processes in (1, 2):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
            subprocess.run([*launcher, *sys.argv], check=True, env=environment)
        return
    getLogger("hf_stompp").setLevel(ERROR)  # the callback misses its Trainer
    size, length = map(int, args.batch.split("x"))
    rows = measure(args, (size, length))
    if dist.get_rank() == 0:
        report(args, rows)
    dist.destroy_process_group()


class Counted:
    """A variant under DDP, and the bytes that it hands over."""

    def __init__(self, name: str, args: argparse.Namespace, batch: tuple[int, int]) -> None:
        self.variant = Variant(name, args.model, batch, args.device, args.bf16)
        self.gradients = 0
        index = int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None
        self.ddp = DistributedDataParallel(self.variant.model, device_ids=None if index is None else [index])
        self.ddp.register_comm_hook(None, self._count)
        self.variant.forward = self.ddp

    def _count(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.gradients += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)

    @property
    def buffers(self) -> int:
        """Bytes of the buffers that are sent in each forward."""
        return sum(buffer.nbytes for buffer in self.ddp.modules_buffers) if self.ddp.broadcast_buffers else 0


def measure(args: argparse.Namespace, batch: tuple[int, int]) -> list[dict[str, Any]]:
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    counted = {name: Counted(name, args, batch) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for round_ in range(-2, args.rounds):
        for name, one in counted.items():
            one.gradients = 0
            one.variant.seek(max(2, 600 * (2 * max(0, round_) + 1) // (2 * args.rounds)))
            dist.barrier()
            start = time.perf_counter()
            one.variant.step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    samples = batch[0] * dist.get_world_size()
    return [
        {
            "processes": dist.get_world_size(),
            "variant": name,
            "samples_per_second": samples / statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["full precision"], strict=True)),
            "gradient_bytes": one.gradients,
            "buffer_bytes": one.buffers,
        }
        for name, one in counted.items()
    ]


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    path = Path(__file__).with_name("results") / f"scaling_{args.model}_{args.device}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() and rows[0]["processes"] > 1 else []
    alone = {row["variant"]: row["samples_per_second"] for row in before if row["processes"] == 1}
    for row in rows:
        speed = row["samples_per_second"]
        of_one = f"{speed / alone[row['variant']]:.2f}" if row["variant"] in alone else ""
        megabytes = (f"{row[key] / 1e6:.6g}" for key in ("gradient_bytes", "buffer_bytes"))
        cells = row["processes"], row["variant"], f"{speed:.1f}", of_one, f"{row['ratio']:.2f}", *megabytes
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    kept = [row for row in before if row["processes"] < rows[0]["processes"]]
    content = {"torch": torch.__version__, "batch": args.batch, "rounds": args.rounds, "rows": [*kept, *rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
