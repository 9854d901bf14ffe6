"""How far students are from their teacher on phrases, as they are trained on, and on sentences: SST-2.

    python -m benchmarks.generalization --teacher out/teachers/sst2 [--dataset_dir GLUE] "W1A1=out/student/packed" ...

The distance is the mean of KL(teacher ‖ student) over texts, in nats. Training rows are phrases, most of
them parts of others; of those here, a student has been trained on as large a share as of all.
Students in the file of an earlier call stay in it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

import hf_stompp  # noqa: F401  # makes transformers read 1-bit checkpoints
from benchmarks.reproduce.runner import processor
from benchmarks.reproduce.study import ROOT
from hf_stompp.checkpoint import write_json
from hf_stompp.results import markdown_table
from hf_stompp.scoring import read_split, text_encoder

BATCH = 50
TRAINED = 2000
"""Rows of the training set, drawn at random."""
LONG = 20
"""Words of a long text; training rows have 9.4 on average."""


@torch.no_grad()
def log_probabilities(model: Any, encode: Any, rows: Any) -> torch.Tensor:
    """Rows x labels."""
    parts = [model(**encode(rows[start : start + BATCH])).logits for start in range(0, len(rows), BATCH)]
    return torch.cat(parts).log_softmax(-1)


def described(model: Any, encode: Any, rows: Any, teacher: torch.Tensor) -> dict[str, float]:
    """Distance to the teacher, of all texts and of long ones, and the accuracy in percent."""
    student = log_probabilities(model, encode, rows)
    distance = (teacher.exp() * (teacher - student)).sum(-1)
    long = torch.tensor([len(text.split()) >= LONG for text in rows["sentence"]])
    right = student.argmax(-1) == torch.tensor(rows["label"])
    return {
        "distance": distance.mean().item(),
        "distance_long": distance[long].mean().item(),
        "accuracy": 100 * right.float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--teacher", required=True, help="its folder, with its tokenizer")
    parser.add_argument("--dataset_dir", help="folder of parquet files; without it the Hub's")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "generalization.json")
    args = parser.parse_args()
    encode = text_encoder(Path(args.teacher), ["sentence"], max_length=128)
    splits = {split: read_split("nyu-mll/glue", "sst2", split, args.dataset_dir) for split in ("train", "validation")}
    splits["train"] = splits["train"].shuffle(seed=5).select(range(TRAINED))
    model = AutoModelForSequenceClassification.from_pretrained(args.teacher)
    judged = {split: log_probabilities(model, encode, rows) for split, rows in splits.items()}
    before = json.loads(args.output.read_text())["students"] if args.output.exists() else {}
    measured = {}
    for name, folder in (student.split("=", 1) for student in args.students):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        measured[name] = {split: described(model, encode, rows, judged[split]) for split, rows in splits.items()}
        print(f"{name}: {measured[name]}", flush=True)
    write_json(args.output, {"hardware": processor(), "students": {**before, **measured}})
    keys = [(split, key) for split in splits for key in ("distance", "distance_long", "accuracy")]
    lines = [[name, *(f"{of[split][key]:.3g}" for split, key in keys)] for name, of in measured.items()]
    print(markdown_table(["student", *(f"{split}, {key}".replace("_", " ") for split, key in keys)], lines))


if __name__ == "__main__":
    main()
