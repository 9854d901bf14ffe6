"""What embedding tables of fewer bits cost in score: SST-2, the W1A1 model of `benchmarks/sst2.py`.

    python benchmarks/embeddings.py --model_name_or_path MODEL [--dataset_dir GLUE]

Two runs of the recipe, StoMPP + STE with full-precision tables and with `--embeddings`, where the tables are binarized
in training. The first model is packed in every way there is. Each packed model is saved, loaded and scored.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sst2 import STOMPP_STE
from studies import ROOT, run
from transformers import AutoModelForSequenceClassification

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
    parser.add_argument("--dataset_dir", help="folder of parquet files; without it the Hub's")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "sst2", help="of benchmarks/sst2.py")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "embeddings.json")
    args, flags = parser.parse_known_args()
    flags += ["--dataset_dir", args.dataset_dir] if args.dataset_dir else []
    tables = replace(STOMPP_STE, name="1-bit tables, binarized in training", flags=("--embeddings", "True"))
    trained, binarized = (run("run_glue", method, 0, flags, args.work_dir) for method in (STOMPP_STE, tables))
    data = read_split("nyu-mll/glue", "sst2", "validation", args.dataset_dir)
    print("| embedding tables | file | accuracy |\n|---|---|---|")
    rows = [measure(name, STOMPP_STE.folder(args.work_dir, 0), data, **how) for name, how in PACKED]
    rows.append(measure(tables.name, tables.folder(args.work_dir, 0), data))
    settings = {key: trained[key] for key in ("steps", "batch_size", "learning_rate", "seed")}
    assert settings == {key: binarized[key] for key in settings}
    args.output.write_text(json.dumps({"torch": torch.__version__, **settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
