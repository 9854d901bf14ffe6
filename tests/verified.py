"""What tests of `verify` share: a frozen model, and what failed."""

from typing import Any

from transformers import PreTrainedModel

from hf_stompp import BinarizationConfig, binarize
from hf_stompp.patching import binary_layers
from hf_stompp.verification import Verification


def freeze(model: PreTrainedModel, **config: Any) -> PreTrainedModel:
    """Binarizes a model, and freezes all of it."""
    model = binarize(model, BinarizationConfig(**config))
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    return model


def failure(done: Verification) -> str:
    """The one check that failed, and its message."""
    (failed,) = [check for check in done.checks if check.status == "failed"]
    assert not done.ok and failed.message and "\n" not in failed.message
    return f"{failed.name}: {failed.message}"
