"""hf_stompp: the Hugging Face way to 1-bit BERTs.

Importing the package registers its quantizer, after which `from_pretrained` takes a [`BinarizationConfig`] and loads
packed checkpoints.
"""

from importlib.metadata import version as _version

from packaging.version import parse as _parse
from transformers.utils import is_peft_available

from hf_stompp import attention
from hf_stompp.calibration import calibrate
from hf_stompp.callback import StomppCallback
from hf_stompp.config import BinarizationConfig
from hf_stompp.hub import model_card, push
from hf_stompp.patching import binarize, pack
from hf_stompp.quantizer import register
from hf_stompp.report import summary
from hf_stompp.resuming import last_checkpoint
from hf_stompp.unpacking import unpack
from hf_stompp.verification import Verification, verify

register()
attention.register()
if is_peft_available() and _parse(_version("peft")) >= _parse("0.20"):
    from hf_stompp.peft import registration

    registration.register()

__all__ = [
    "BinarizationConfig",
    "StomppCallback",
    "Verification",
    "binarize",
    "calibrate",
    "last_checkpoint",
    "model_card",
    "pack",
    "push",
    "summary",
    "unpack",
    "verify",
]
