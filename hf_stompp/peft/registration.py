"""Where PEFT, and transformers for PEFT, call what is in this package."""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

from hf_stompp.peft import card, one_bit, records


def register() -> None:
    """Puts what is in this package around methods of PEFT; a second call does nothing. Other models do not notice."""
    if hasattr(BaseTuner.inject_adapter, "__wrapped__"):
        return
    for check in (one_bit.unfuse_base, one_bit.check_adapter):  # the last one comes first
        BaseTuner.inject_adapter = _before(BaseTuner.inject_adapter, check)
    BaseTuner._check_merge_allowed = _before(BaseTuner._check_merge_allowed, one_bit.check_merge)
    PeftConfig.from_json_file = classmethod(_around(PeftConfig.from_json_file.__func__, records.without_records))
    for kind in (PeftModel, PeftMixedModel):
        kind.from_pretrained = classmethod(_around(kind.from_pretrained.__func__, records.make_checked))
        kind.load_adapter = _around(kind.load_adapter, records.load_checked)
    PreTrainedModel.load_adapter = _around(PreTrainedModel.load_adapter, records.load_checked_inside)
    for kind in (PeftModel, PreTrainedModel):
        kind.save_pretrained = _around(kind.save_pretrained, records.save_and_record)
    PeftModel.create_or_update_model_card = _around(PeftModel.create_or_update_model_card, card.write)


def _before(method: Callable[..., Any], do: Callable[..., None]) -> Callable[..., Any]:
    """The method, after something else with the same arguments."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        return method(*args, **kwargs)

    return called


def _around(method: Callable[..., Any], do: Callable[..., Any]) -> Callable[..., Any]:
    """What is given the method, as its first argument, and the method's own."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return do(method, *args, **kwargs)

    return called
