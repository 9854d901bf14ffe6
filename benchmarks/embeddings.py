"""What embedding tables of fewer bits cost in score: SST-2, the W1A1 model of StoMPP + STE.

    python -m benchmarks.embeddings --model_name_or_path MODEL [--dataset_dir GLUE]

Two runs of the recipe, of the study `embeddings`: with full-precision tables, and with `--embeddings`, where the
tables are binarized in training. The first model is packed in every way there is. Each packed model is saved, loaded
and scored.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.reproduce.runner import identity, run_study
from benchmarks.reproduce.study import ROOT, Study
from hf_stompp import pack
from hf_stompp.scoring import predict, read_split, text_encoder

PACKED = [
    ("float32 tables", {}),
    *((f"{bits}-bit tables, rounded", {"embedding_bits": bits}) for bits in (16, 8, 4, 1)),
    ("8-bit tables, rest float16", {"embedding_bits": 8, "dtype": torch.float16}),
]


def measure(name: str, trained: Path, data: Any, **how: Any) -> dict[str, Any]:
    """Packs the model of a run in one way, and scores what is loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        pack(AutoModelForSequenceClassification.from_pretrained(trained), **how).save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        predicted = predict(model, text_encoder(trained, ["sentence"], max_length=128), data)
    right = sum(a == b for a, b in zip(predicted, data["label"], strict=True))
    row = {"tables": name, "bytes": size, "accuracy": 100 * right / len(data)}
    print(f"| {name} | {size / 1e6:.1f} MB | {row['accuracy']:.1f} |", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_dir", help="folder of parquet files; without it the Hub's")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "reproduce")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "embeddings.json")
    args = parser.parse_args()
    places = {"model_name_or_path": args.model_name_or_path, "dataset_dir": args.dataset_dir}
    flags = {name: place for name, place in places.items() if place}
    study = Study.read("embeddings")
    run_study(
        study,
        args.work_dir / "embeddings.jsonl",
        args.work_dir,
        jobs=1,
        flags=flags,
    )
    trained, binarized = (args.work_dir / identity(run, flags) for run in study.runs)
    data = read_split("nyu-mll/glue", "sst2", "validation", args.dataset_dir)
    print("| embedding tables | file | accuracy |\n|---|---|---|")
    rows = [measure(name, trained, data, **how) for name, how in PACKED]
    rows.append(measure("1-bit tables, binarized in training", binarized, data))
    results = json.loads((trained / "results.json").read_text())
    settings = {key: results[key] for key in ("steps", "batch_size", "learning_rate", "seed")}
    assert settings.items() <= json.loads((binarized / "results.json").read_text()).items()
    args.output.write_text(json.dumps({"torch": torch.__version__, **settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
