"""The Trainer, and the handler of callbacks, that are calling a callback, which is given neither."""

import inspect
from typing import Any

from transformers.trainer_callback import CallbackHandler


def calling_trainer() -> Any:
    """The Trainer that is calling, or None."""
    from transformers import Trainer  # it takes seconds, and whoever calls this has done it

    return _caller(Trainer)


def calling_handler() -> CallbackHandler | None:
    """The handler of callbacks that is calling, or None."""
    handler: CallbackHandler | None = _caller(CallbackHandler)
    return handler


def _caller(kind: type) -> Any:
    """The nearest object of `kind` that is calling: the calling frames are the one place to find it without asking
    users to pass the Trainer in."""
    frame = inspect.currentframe()
    try:
        while frame is not None:
            if isinstance(frame.f_locals.get("self"), kind):
                return frame.f_locals["self"]
            frame = frame.f_back
        return None
    finally:
        del frame  # or the frames would keep each other alive
