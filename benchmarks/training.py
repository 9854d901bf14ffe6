"""What binarization adds to a training step: time and peak memory, side by side in one process.

Each round runs one whole optimizer step (masks, forward, backward, AdamW) of every variant in turn, so that a machine
whose speed drifts slows all of them alike; the table gives medians, and medians of the ratios round by round. The
rounds are spread over a run of 600 steps, so that all states of the front are in them. What comes once for each unit,
its calibration when its window begins (a forward pass), is in none of them: in MiniLM 24 in the whole run.

    python benchmarks/training.py                                # MiniLM-L6 shapes, 32 x 16 and 8 x 128 tokens
    HF_STOMPP_KERNELS=reference python benchmarks/training.py    # without the extra `fast`
    python benchmarks/training.py --model bert-base --device cuda --batches 32x128 --bf16
    python benchmarks/training.py --model resnet-18-quarter --batches 64x64        # 64 images of 64 x 64 pixels
    python benchmarks/training.py --model bert-3x384 --batches 16x64 --peers       # beside other libraries' layers

`--peers` puts the layers of other libraries in the same places: transformers' `AutoBitLinear` (1.58 bits, online),
and, where they are installed, torchao's fake quantizers (4-bit weights, 8-bit inputs) and brevitas' binary layers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedConfig,
    ResNetConfig,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import set_seed as seed_everything

from hf_stompp import BinarizationConfig, StomppCallback, binarize, kernels
from hf_stompp.patching import binary_layers
from hf_stompp.selection import select

RUN = 600  # optimizer steps
MODELS: dict[str, PreTrainedConfig] = {
    "bert-3x384": BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=6, intermediate_size=1536),
    "minilm-l6": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "bert-base": BertConfig(),
    # That of recipes/configs/cifar10_resnet18_small.yaml.
    "resnet-18-quarter": ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 128], embedding_size=16
    ),
    "resnet-18": ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
    "resnet-50": ResNetConfig(),
}
VARIANTS: dict[str, BinarizationConfig | None] = {
    "full precision": None,
    "STE baseline": BinarizationConfig(surrogate="ste", progression="none"),
    "StoMPP + STE": BinarizationConfig(surrogate="ste", progression_end=1.0),
    "StoMPP STE-free": BinarizationConfig(surrogate="none", progression_end=1.0),
    "StoMPP + STE, global": BinarizationConfig(surrogate="ste", progression="global", progression_end=1.0),
    "weights only": BinarizationConfig(activations=False, progression_end=1.0),
}


def bit_linear(model: nn.Module, names: list[str]) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    for name in names:
        plain = model.get_submodule(name)
        layer = AutoBitLinear(plain.in_features, plain.out_features, plain.bias is not None, online_quant=True)
        layer.load_state_dict(plain.state_dict())
        model.set_submodule(name, layer)


def torchao(model: nn.Module, names: list[str]) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: name in names)


def brevitas(model: nn.Module, names: list[str]) -> None:
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst

    rules = {"weight_quant": SignedBinaryWeightPerTensorConst, "input_quant": SignedBinaryActPerTensorConst}
    for name in names:
        plain = model.get_submodule(name)
        bias = plain.bias is not None
        if isinstance(plain, nn.Linear):
            layer = QuantLinear(plain.in_features, plain.out_features, bias, **rules)
        else:
            sizes = plain.kernel_size, plain.stride, plain.padding, plain.dilation, plain.groups
            layer = QuantConv2d(plain.in_channels, plain.out_channels, *sizes, bias=bias, **rules)
        layer.load_state_dict(plain.state_dict(), strict=False)
        model.set_submodule(name, layer)


PEERS = {"transformers AutoBitLinear": bit_linear, "torchao QAT, W4A8": torchao, "brevitas, binary": brevitas}
LIBRARIES = {bit_linear: "transformers", torchao: "torchao", brevitas: "brevitas"}


def with_peers(model: str) -> list[str]:
    """The names of all variants of a model; of peers, those that are installed and have layers for it."""
    linear = isinstance(MODELS[model], BertConfig)
    there = [name for name, put in PEERS.items() if find_spec(LIBRARIES[put]) and (linear or put is brevitas)]
    return [*VARIANTS, *there]


def versions(names: list[str]) -> dict[str, str]:
    """The libraries of those of the variants that are peers, and which they were."""
    return {library: version(library) for library in (LIBRARIES[PEERS[name]] for name in names if name in PEERS)}


class Variant:
    """A model, its optimizer and its callback, driven as the Trainer drives them."""

    def __init__(self, name: str, model: str, batch: tuple[int, int], device: str, bf16: bool) -> None:
        seed_everything(0)
        size, length = batch
        made_of = MODELS[model]
        if isinstance(made_of, BertConfig):
            self.model = AutoModelForSequenceClassification.from_config(made_of).to(device)
            data = {"input_ids": torch.randint(1000, 30000, batch)}
        else:
            self.model = AutoModelForImageClassification.from_config(made_of).to(device)
            data = {"pixel_values": torch.randn(size, made_of.num_channels, length, length)}
        config = VARIANTS.get(name)
        if config is not None:
            binarize(self.model, config)
        if name in PEERS:
            PEERS[name](self.model, [one.name for one in select(self.model, BinarizationConfig()) if not one.skipped])
        self.device, self.bf16 = device, bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        examples = [{key: rows[i] for key, rows in data.items()} | {"labels": torch.tensor(0)} for i in range(size)]
        loader = DataLoader(examples, batch_size=size)
        self.inputs = {key: value.to(device) for key, value in next(iter(loader)).items()}
        self.state, self.control = TrainerState(max_steps=RUN), TrainerControl()
        self.args = TrainingArguments(use_cpu=device == "cpu", report_to="none")
        self.callback = StomppCallback() if config is not None else None
        self.model.train()
        self.forward: Callable[..., Any] = self.model
        self._event("on_train_begin", train_dataloader=loader)

    def _event(self, event: str, **kwargs: Any) -> None:
        if self.callback is not None:
            getattr(self.callback, event)(self.args, self.state, self.control, model=self.model, **kwargs)

    def seek(self, step: int) -> None:
        """Goes to optimizer step `step` of the run, as if the one before it had just been made."""
        self.state.global_step = step - 2
        self._event("on_step_begin")
        self.state.global_step = step - 1

    def step(self) -> None:
        self._event("on_step_begin")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.forward(**self.inputs).loss
        loss.backward()
        self._event("on_pre_optimizer_step")
        self.optimizer.step()
        self._event("on_optimizer_step")
        self.optimizer.zero_grad()
        self.state.global_step += 1

    def extra_state(self) -> str:
        """Bytes of masks for each binarized weight and for each activation feature."""
        layers = binary_layers(self.model).values()
        if not layers:
            return ""
        weights = sum(layer.weight_mask.nbytes for layer in layers) / sum(layer.weight.numel() for layer in layers)
        features = sum(layer.activation_mask.nbytes for layer in layers) / sum(
            layer.input_features for layer in layers
        )
        return f"{weights:.0f} B/weight + {features:.0f} B/feature"


def timed(step: Callable[[], None], device: str) -> float:
    """Milliseconds of one step; processor time on a CPU, which neighbours on a shared machine disturb less."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def peak_memory(name: str, *args: Any) -> float:
    """MB that a few steps take at their peak: of the device, or of a fresh child process on a CPU."""
    device = args[2]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        variant = Variant(name, *args)
        for _ in range(3):
            variant.step()
        return torch.cuda.max_memory_allocated() / 1e6
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child_peak, args=(queue, name, torch.get_num_threads(), *args))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _child_peak(queue: Any, name: str, threads: int, *args: Any) -> None:
    torch.set_num_threads(threads)
    before = _peak_resident()
    variant = Variant(name, *args)
    variant.seek(RUN // 2)  # the front is in the middle: frozen, mixed and soft layers
    for _ in range(3):
        variant.step()
    queue.put(_peak_resident() - before)


def _peak_resident() -> float:
    """MB of this process at its peak; by Linux's /proc, because the ru_maxrss of a child begins at its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def measure(
    names: list[str], model: str, batch: tuple[int, int], rounds: int, device: str, bf16: bool
) -> list[dict[str, Any]]:
    warmup = 2
    variants = {name: Variant(name, model, batch, device, bf16) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, rounds):
        for name, variant in variants.items():
            variant.seek(RUN * (2 * max(0, round_) + 1) // (2 * rounds))
            elapsed = timed(variant.step, device)
            if round_ >= 0:
                times[name].append(elapsed)
    rows = []
    for name, variant in variants.items():
        ratios = {
            other: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for other in ("full precision", "STE baseline")
        }
        rows.append(
            {
                "model": model,
                "inputs": f"{batch[0]}x{batch[1]}",
                "variant": name,
                "ms": statistics.median(times[name]),
                "ratio": ratios["full precision"],
                "ratio_ste": ratios["STE baseline"],
                "state": variant.extra_state(),
            }
        )
    del variants
    for row in rows:
        row["peak_mb"] = peak_memory(row["variant"], model, batch, device, bf16)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm-l6")
    parser.add_argument(
        "--batches", nargs="+", default=["32x16", "8x128"], help="batch size x sequence length, or side in pixels"
    )
    parser.add_argument("--peers", action="store_true", help="beside the layers of other libraries")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/training_MODEL_BACKEND.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    getLogger("hf_stompp").setLevel(ERROR)  # the callback misses its Trainer
    names, rows = with_peers(args.model) if args.peers else list(VARIANTS), []
    print("| model | inputs | variant | ms/step | vs full precision | vs STE | peak MB | extra state |")
    print("|---|---|---|---|---|---|---|---|")
    for text in args.batches:
        size, length = map(int, text.split("x"))
        for row in measure(names, args.model, (size, length), args.rounds, args.device, args.bf16):
            rows.append(row)
            print(
                f"| {row['model']} | {row['inputs']} | {row['variant']} | {row['ms']:.0f} | {row['ratio']:.2f} "
                f"| {row['ratio_ste']:.2f} | {row['peak_mb']:.0f} | {row['state']} |",
                flush=True,
            )
    backend = kernels.backend() if args.device == "cpu" else args.device
    output = args.output or Path(f"benchmarks/results/training_{args.model}_{backend}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    made_with = {"torch": torch.__version__, "threads": args.threads, "kernels": kernels.backend()}
    made_with |= {"rounds": args.rounds, "peers": versions(names)}
    output.write_text(json.dumps({**made_with, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
