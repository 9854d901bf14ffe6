"""Adapters of PEFT on 1-bit models: what PEFT has to be told of them.

Nothing is called for that. With `hf_stompp` imported, `get_peft_model`, `PeftModel.from_pretrained` and
`AutoModel….from_pretrained(adapter)` take latent, packed and dequantized models. An adapter knows the bits that it was
trained on, and is not loaded on others. What cannot be right is refused: a weight of one bit has no room for a sum,
and no initialisation can be made of a float weight that is not there.
"""

from transformers.utils import is_peft_available

if not is_peft_available():
    raise ImportError("hf_stompp.peft is for adapters of PEFT; pip install peft, or hf_stompp[peft].")

from hf_stompp.peft.base import train_base, without_adapters

__all__ = ["train_base", "without_adapters"]
