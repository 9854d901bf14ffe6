"""What adapters on a packed model take: memory of training and of serving two tasks, and the time of a request.

    python benchmarks/adapters.py                          # MiniLM-L6 shapes
    python benchmarks/adapters.py --model bert-base

Training: each row is a fresh process that loads a model, makes a few optimizer steps (AdamW, 32 texts of 16 tokens),
and says by how much its peak (VmHWM, on Linux) is over what it was before it loaded anything. LoRA is on all layers of
the encoder and the pooler.

Serving: again a process for each row, which loads what two tasks take and answers 20 requests of 32 tokens, to the one
and the other in turn; memory as above, milliseconds of a request as medians. Weights are random. Writes
`benchmarks/results/adapters_MODEL.json`.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from sizes import machine
from training import MODELS, _peak_resident
from transformers import BertForSequenceClassification
from transformers import set_seed as seed_everything

from hf_stompp import BinarizationConfig, binarize, calibrate, kernels, pack
from hf_stompp.patching import binary_layers

BATCH, REQUEST, STEPS, REQUESTS = (32, 16), (1, 32), 4, 20
NORMS_AND_BIASES = {"target_modules": DUMMY_TARGET_MODULES, "bias": "all", "modules_to_save": ["LayerNorm"]}
TRAINED: dict[str, tuple[str, dict[str, Any] | None]] = {
    "all weights, full precision": ("full", None),
    "all weights, latent": ("latent", None),
    **{f"LoRA, r = {r}": ("packed", {"r": r, "target_modules": "all-linear"}) for r in (4, 8, 16, 32)},
    "norms and biases": ("packed", NORMS_AND_BIASES),
}


def save(model: str, folder: Path) -> None:
    """The model in full precision, latent and packed, and two adapters on it."""
    seed_everything(0)
    whole = BertForSequenceClassification(MODELS[model]).eval()  # type: ignore[arg-type]
    whole.save_pretrained(folder / "full")
    binarize(whole, BinarizationConfig(surrogate="ste", replace_gelu=True))
    for layer in binary_layers(whole).values():
        layer.set_frozen(1.0, step=1)
    calibrate(whole, {"input_ids": tokens(whole, BATCH)})
    whole.save_pretrained(folder / "latent")
    pack(whole).save_pretrained(folder / "packed")
    for name in ("first", "second"):
        base = BertForSequenceClassification.from_pretrained(folder / "packed")
        adapted = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
        adapted.save_pretrained(folder / name)


def tokens(model: Any, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(1000, model.config.vocab_size, shape)


def train(kind: str, folder: Path) -> dict[str, float]:
    source, config = TRAINED[kind]
    before = _peak_resident()
    model: Any = BertForSequenceClassification.from_pretrained(folder / source)
    if config is not None:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **config))
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    times = []
    for _ in range(STEPS):
        start = time.process_time()
        model.train()(input_ids=tokens(model, BATCH), labels=torch.randint(2, BATCH[:1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.process_time() - start))
    trained = sum(each.numel() for each in parameters)
    return {"peak_mb": _peak_resident() - before, "parameters": trained, "ms": statistics.median(times)}


def two_of(name: str) -> Callable[[Path], Callable[[int, torch.Tensor], Any]]:
    """Two whole models."""

    def load(folder: Path) -> Callable[[int, torch.Tensor], Any]:
        models = [BertForSequenceClassification.from_pretrained(folder / name).eval() for _ in range(2)]
        return lambda task, ids: models[task](input_ids=ids)

    return load


def alone(folder: Path) -> Callable[[int, torch.Tensor], Any]:
    model = BertForSequenceClassification.from_pretrained(folder / "packed").eval()
    return lambda task, ids: model(input_ids=ids)


def adapted(folder: Path) -> Callable[[int, torch.Tensor], Any]:
    base = BertForSequenceClassification.from_pretrained(folder / "packed")
    model = PeftModel.from_pretrained(base, str(folder / "first")).eval()
    return lambda task, ids: model(input_ids=ids)


def switching(folder: Path) -> Callable[[int, torch.Tensor], Any]:
    base = BertForSequenceClassification.from_pretrained(folder / "packed")
    model: Any = PeftModel.from_pretrained(base, str(folder / "first"), adapter_name="first")
    model.load_adapter(str(folder / "second"), "second")
    model.eval()

    def answer(task: int, ids: torch.Tensor) -> Any:
        model.set_adapter(("first", "second")[task])
        return model(input_ids=ids)

    return answer


def naming(folder: Path) -> Callable[[int, torch.Tensor], Any]:
    """PEFT chooses an adapter for each row of a batch."""
    base = BertForSequenceClassification.from_pretrained(folder / "packed")
    model: Any = PeftModel.from_pretrained(base, str(folder / "first"), adapter_name="first")
    model.load_adapter(str(folder / "second"), "second")
    model.eval()
    return lambda task, ids: model(input_ids=ids, adapter_names=[("first", "second")[task]] * len(ids))


SERVED: dict[str, Callable[[Path], Callable[[int, torch.Tensor], Any]]] = {
    "one packed model, one task": alone,
    "one packed base, one adapter, one task": adapted,
    "one packed base, two adapters, switched": switching,
    "one packed base, two adapters, named": naming,
    "two packed models": two_of("packed"),
    "two full-precision models": two_of("full"),
}


def serve(kind: str, folder: Path) -> dict[str, float]:
    before, times = _peak_resident(), []
    answer = SERVED[kind](folder)
    with torch.no_grad():
        for request in range(REQUESTS + 2):
            start = time.process_time()
            answer(request % 2, torch.randint(1000, 2000, REQUEST))
            times.append(1000 * (time.process_time() - start))
    return {"peak_mb": _peak_resident() - before, "ms": statistics.median(times[2:])}


def in_a_process(queue: Any, measured: Callable[[str, Path], dict[str, float]], kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    kernels.backend()  # what is imported and compiled for it is nobody's
    queue.put(measured(kind, folder))


def measure(measured: Callable[[str, Path], dict[str, float]], kind: str, folder: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_a_process, args=(queue, measured, kind, folder))
    process.start()
    found: dict[str, float] = queue.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm-l6", "bert-base"), default="minilm-l6")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each row; medians count")
    args = parser.parse_args()
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(args.model, folder)
        for _ in range(args.rounds):
            for measured, kinds in ((train, TRAINED), (serve, SERVED)):
                for kind in kinds:
                    samples.setdefault((measured.__name__, kind), []).append(measure(measured, kind, folder))
    rows = [
        {"of": of, "what": kind} | {key: statistics.median(one[key] for one in found) for key in found[0]}
        for (of, kind), found in samples.items()
    ]
    print("| | | trained parameters | peak MB | ms |\n|---|---|---|---|---|")
    for row in rows:
        trained = f"{row['parameters']:,}" if "parameters" in row else ""
        print(f"| {row['of']} | {row['what']} | {trained} | {row['peak_mb']:.0f} | {row['ms']:.1f} |")
    result = {
        **machine(),
        "model": args.model,
        "rounds": args.rounds,
        "batch": BATCH,
        "request": REQUEST,
        "rows": rows,
    }
    output = Path(__file__).with_name("results") / f"adapters_{args.model}.json"
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
