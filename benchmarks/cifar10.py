"""The README's CIFAR-10 tables: every method by `recipes/run_image_classification.py`, the same steps and batches.

    python benchmarks/cifar10.py [resnet18|mobilenet_v2] [--dataset_dir CIFAR10] [--jobs 2]

`resnet18` is from scratch, in the reduced setting of `cifar10_resnet18_small.yaml`; `mobilenet_v2` is fine-tuned from
`--model_name_or_path`. Writes `benchmarks/results/cifar10_NAME.json` and prints the table; see `studies.study`.
"""

import sys

from studies import Method, study

SEEDS = (0, 1, 2)
SMALL, MOBILE = "cifar10_resnet18_small", "cifar10_mobilenet_v2"
RATE = "--learning_rate"
REPLACED, KEPT = ("--replace_relu",), ("--replace_relu", "false")
METHODS = {
    "resnet18": [
        Method("full precision", SMALL, ("--binarize", "false", RATE, "4e-3")),
        Method("StoMPP, weights only (W1A32)", SMALL, ("--no_activations", RATE, "4e-3")),
        Method("STE baseline (W1A1)", SMALL, ("--progression", "none", RATE, "4e-3"), SEEDS),
        Method("StoMPP, STE-free (W1A1)", SMALL, ("--surrogate", "none", RATE, "8e-3"), SEEDS),
        Method("StoMPP + STE (W1A1)", SMALL, (RATE, "8e-3"), SEEDS),
        Method("STE baseline, the other's rate", SMALL, ("--progression", "none", RATE, "8e-3")),
        Method("STE baseline, ReLUs replaced", SMALL, ("--progression", "none", *REPLACED, RATE, "4e-3")),
        Method("StoMPP, STE-free, ReLUs replaced", SMALL, ("--surrogate", "none", *REPLACED, RATE, "8e-3")),
        Method("StoMPP + STE, ReLUs replaced", SMALL, (*REPLACED, RATE, "8e-3")),
        Method("StoMPP + STE, ReLUs replaced, Bi-Real", SMALL, (*REPLACED, "--bireal_shortcuts", RATE, "8e-3")),
    ],
    "mobilenet_v2": [
        Method("full precision", MOBILE, ("--binarize", "false", RATE, "1e-3")),
        Method("StoMPP, weights only (W1A32)", MOBILE, ("--no_activations", *KEPT, RATE, "1e-3")),
        Method("STE baseline (W1A1)", MOBILE, ("--progression", "none")),
        Method("StoMPP + STE (W1A1)", MOBILE),
        Method("StoMPP + STE (W1A1), ReLUs kept", MOBILE, KEPT),
    ],
}

if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in METHODS else "resnet18"
    study(f"cifar10_{name}", str(__doc__), "run_image_classification", METHODS[name])
