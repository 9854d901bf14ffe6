"""Where PEFT calls what is in this package."""

import functools
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner

from hf_stompp.peft import base, card, one_bit


def register() -> None:
    """Tells PEFT of the layers; once is enough."""
    LoraConfig.__post_init__ = _after(LoraConfig.__post_init__, one_bit.know_convolutions)
    for check in (base.check_injection, one_bit.unfuse_base, one_bit.check_adapter):  # the last one comes first
        BaseTuner.inject_adapter = _before(BaseTuner.inject_adapter, check)
    BaseTuner._check_merge_allowed = _before(BaseTuner._check_merge_allowed, one_bit.check_merge)
    PeftConfig.from_peft_type = classmethod(_around(PeftConfig.from_peft_type.__func__, base.remember_base))
    PeftConfig.to_dict = _around(PeftConfig.to_dict, base.name_base)
    PeftModel.add_adapter = _before(PeftModel.add_adapter, base.check_prompt)
    PeftModel.load_adapter = _around(PeftModel.load_adapter, base.load_with_base)
    PeftModel.save_pretrained = _around(PeftModel.save_pretrained, base.save_with_base)
    PeftModel.create_or_update_model_card = _around(PeftModel.create_or_update_model_card, card.write)


def _before(method: Callable[..., Any], do: Callable[..., None]) -> Callable[..., Any]:
    """The method, after something else with the same arguments."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        return method(*args, **kwargs)

    return called


def _after(method: Callable[..., Any], do: Callable[..., None]) -> Callable[..., Any]:
    """The method, and something else with the same arguments afterwards."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        do(*args, **kwargs)
        return result

    return called


def _around(method: Callable[..., Any], do: Callable[..., Any]) -> Callable[..., Any]:
    """What is given the method, as its first argument, and the method's own."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return do(method, *args, **kwargs)

    return called
