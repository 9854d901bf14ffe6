"""What packed image models take on disk, part by part: the shapes of well-known models, random weights, 1,000 classes.

    python benchmarks/vision_sizes.py

Every model is binarized (W1A1), packed and saved, in float32 and with all that is not 1-bit in float16. The bytes of
the parts are those of the tensors, grouped by the role of their layer; what is left is the file's header.
Writes `benchmarks/results/vision_sizes.json` and prints the tables.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    RegNetConfig,
    ResNetConfig,
    ViTConfig,
)

from hf_stompp import BinarizationConfig, binarize, calibrate, pack, summary
from hf_stompp.patching import binary_layers

BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
MODELS: dict[str, PreTrainedConfig] = {
    "ResNet-18": ResNetConfig(**BASIC, depths=[2, 2, 2, 2]),
    "ResNet-34": ResNetConfig(**BASIC, depths=[3, 4, 6, 3]),
    "ResNet-50": ResNetConfig(),
    "MobileNetV2 1.0": MobileNetV2Config(),
    "RegNet-Y 4.0": RegNetConfig(),
    "ConvNeXt-T": ConvNextConfig(),
    "ViT-B/16": ViTConfig(),
}
COLUMNS = {
    "1-bit layers": ("encoder",),
    "stem": ("stem",),
    "shortcuts": ("shortcut",),
    "depthwise": ("depthwise",),
    "gates": ("gate",),
    "head": ("head",),
    "norms and others": ("",),
}


def measure(config: PreTrainedConfig) -> dict[str, Any]:
    """Sizes in bytes of one model in float32, packed, and packed with the rest in float16."""
    config.num_labels = 1000
    model = AutoModelForImageClassification.from_config(config).eval()
    row = {"parameters": model.num_parameters(), "float32": file_bytes(model, {})[0]}
    binarize(model, BinarizationConfig())
    calibrate(model, {"pixel_values": torch.randn(1, 3, 224, 224)})
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    roles = {layer.name: layer.role for layer in summary(model).rows}
    for name, dtype in (("packed", None), ("packed, rest float16", torch.float16)):
        size, parts = file_bytes(pack(model, dtype=dtype), roles)
        row[name] = {"file": size, **parts}
    return row


def file_bytes(model: PreTrainedModel, roles: dict[str, str]) -> tuple[int, dict[str, int]]:
    """The size of the file, and of the tensors of each part."""
    parts: Counter[str] = Counter({column: 0 for column in COLUMNS})
    for name, tensor in model.state_dict().items():
        role = roles.get(name.rpartition(".")[0], "")
        parts[next(column for column, known in COLUMNS.items() if role in known)] += tensor.nbytes
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="10GB")
        return (Path(folder) / "model.safetensors").stat().st_size, dict(parts)


def table(rows: dict[str, dict[str, Any]], packed: str) -> str:
    header = ["model", "float32", packed, "times smaller", *COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        sizes = [row["float32"], row[packed]["file"]]
        cells = [name, *(f"{size / 1e6:.2f}" for size in sizes), f"{sizes[0] / sizes[1]:.1f}"]
        cells += [f"{row[packed][column] / 1e6:.2f}" for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--output", type=Path, default=results / "vision_sizes.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = {name: measure(config) for name, config in MODELS.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n")
    for packed in ("packed", "packed, rest float16"):
        print(f"Megabytes, {packed}:\n\n{table(rows, packed)}\n")


if __name__ == "__main__":
    main()
