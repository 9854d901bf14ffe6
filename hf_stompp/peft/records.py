"""What an adapter belongs to: recorded in its `adapter_config.json`, and asked for when it is loaded."""

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file, logging

from hf_stompp.checkpoint import read_json, weight_files, whole_folder, write_json
from hf_stompp.patching import TRAINS_BASE, binary_layers, binary_weights, bits_of, packed_layers
from hf_stompp.peft.base import without_adapters
from hf_stompp.sharding import is_sharded

logger = logging.get_logger(__name__)

CONFIG = "adapter_config.json"
BITS = "hf_stompp_base_bits"
"""Its field that has the SHA-256 of the bits which the adapter was trained on."""
BASE = "hf_stompp_base"
"""Its field that says where, from its folder, a base is that was trained with the adapter."""
FOLDER = "latent_base"


# --- what is saved beside an adapter ---------------------------------------------------------------------------------


def save_and_record(save: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> None:
    """Saves adapters, and in `adapter_config.json` what they belong to; and a base that is trained with them, which is
    nowhere else."""
    given = inspect.signature(save).bind(model, *args, **kwargs)
    given.apply_defaults()
    folder, main = Path(given.arguments["save_directory"]), given.arguments["is_main_process"]
    adapters = list(getattr(model, "peft_config", {}))
    own = bool(adapters) and getattr(model, TRAINS_BASE, False)
    if own and main:
        _save_base(model, folder / FOLDER)
    save(model, *args, **kwargs)
    bits = bits_of(model) if adapters and not own else None
    if not main or not (own or bits):
        return
    for name in given.arguments.get("selected_adapters") or adapters:
        # PEFT has a folder for each adapter that is not called default, and transformers for none.
        inside = isinstance(model, PeftModel) and name != "default"
        path = (folder / name if inside else folder) / CONFIG
        if path.is_file():
            record = {BASE: f"../{FOLDER}" if inside else FOLDER} if own else {BITS: bits}
            content = read_json(path.parent, CONFIG) | record
            write_json(path, content)
            if not own and not content["base_model_name_or_path"]:
                logger.warning(
                    f"{path} names no base, so that Auto classes cannot load it: save the base, set "
                    f"model.peft_config[{name!r}].base_model_name_or_path to its folder or Hub id, and save again."
                )


def _save_base(model: Any, folder: Path) -> None:
    if FOLDER in model.peft_config:
        raise ValueError(
            f"An adapter is called {FOLDER!r}, as the folder of the base that is trained with it: rename it."
        )
    if any(is_sharded(layer.weight) for layer in binary_weights(model).values()):
        raise ValueError("A base that FSDP has sharded cannot be saved beside its adapter: train both with DDP.")
    with whole_folder(folder) as draft:
        without_adapters(model).save_pretrained(draft)


def without_records(read: Callable[..., dict[str, Any]], cls: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What `adapter_config.json` has besides: PEFT's configs have no fields for it."""
    return {name: value for name, value in read(cls, *args, **kwargs).items() if name not in (BITS, BASE)}


# --- what is loaded on what ------------------------------------------------------------------------------------------


def make_checked(make: Callable[..., Any], cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained`, on what the adapter belongs to."""
    Record.read(model_id, kwargs).base_for(model)  # before anything is put into it
    return make(cls, model, model_id, *args, **kwargs)


def load_checked(load: Callable[..., Any], model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """`load_adapter` of PEFT, on what the adapter belongs to."""
    name = kwargs.get("adapter_name", args[0] if args else None)
    return _load(partial(load, model, model_id, *args, **kwargs), model, Record.read(model_id, kwargs), name)


def load_checked_inside(load: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """`load_adapter` of transformers, whose model has the adapter in it, on what the adapter belongs to."""
    given = inspect.signature(load).bind(model, *args, **kwargs).arguments
    loading = given.get("load_config")
    model_id = given.get("peft_model_id") or getattr(loading, "pretrained_model_name_or_path", None)
    call = partial(load, model, *args, **kwargs)
    if model_id is None:  # the weights are given
        return call()
    options = {**getattr(loading, "download_kwargs", {}), **kwargs, **(given.get("adapter_kwargs") or {})}
    return _load(call, model, Record.read(model_id, options), given.get("adapter_name"))


def _load(load: Callable[[], Any], model: Any, record: "Record", adapter_name: str | None) -> Any:
    base = record.base_for(model, adapter_name)
    record.check_alike(getattr(model, "peft_config", {}).get(adapter_name))
    try:
        result = load()
    except SafetensorError as error:
        raise ValueError(
            f"The adapter in {record.folder} is truncated or corrupted: {error}. Save it again."
        ) from error
    if base is not None:
        without_adapters(model).load_state_dict(base, strict=False)
        for layer in binary_layers(model).values():  # those that were loaded are others, around the same tensors
            layer.load_masks()
        setattr(model, TRAINS_BASE, True)
    return result


class Record(NamedTuple):
    """What an `adapter_config.json` says of its base.

    Attributes:
        folder (`Path`, *optional*): Where the adapter is.
        kind, rank (*optional*): Its method, and how many dimensions it has.
        name (`str`, *optional*): What the base was loaded by.
        bits (`str`, *optional*): SHA-256 of its bits.
        base (`Path`, *optional*): Where it is, if it was trained with the adapter.
    """

    folder: Path | None = None
    kind: str | None = None
    rank: int | None = None
    name: str | None = None
    bits: str | None = None
    base: Path | None = None

    @classmethod
    def read(cls, model_id: str | os.PathLike[str], options: Mapping[str, Any]) -> "Record":
        """That of a folder or of a repository; of one that cannot be read, which PEFT will say, nothing."""
        known = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
        given = {name: options[name] for name in known if options.get(name) is not None}
        try:
            file = cached_file(str(model_id), CONFIG, **given)
            content = read_json(Path(str(file)).parent, CONFIG)
        except (OSError, ValueError):
            return cls()
        folder, base = Path(str(file)).parent, content.get(BASE)
        kind, rank, name, bits = (content.get(key) for key in ("peft_type", "r", "base_model_name_or_path", BITS))
        return cls(folder, kind, rank, name, bits, None if base is None else folder / base)

    def check_alike(self, config: Any) -> None:
        """Refuses to load it in the place of an adapter of another kind or rank, as where a run is resumed.

        Raises:
            ValueError: It is of another.
        """
        if config is None or (self.bits is None and self.base is None):
            return
        for what, here, there in (
            ("method", str(config.peft_type.value), self.kind),
            ("rank", getattr(config, "r", None), self.rank),
        ):
            if here != there:
                raise ValueError(
                    f"The adapter in {self.folder} has the {what} {there}, and the model's has {here}. Resume with "
                    "the settings of the checkpoint, or start anew in another output_dir."
                )

    def base_for(self, model: Any, adapter_name: str | None = None) -> dict[str, Tensor] | None:
        """The weights of the base that belong into this model, if the adapter was trained with it.

        Raises:
            ValueError: The adapter belongs to another model.
        """
        if self.base is not None:
            return self._trained(model, adapter_name)
        packed = packed_layers(model).values()
        if self.bits is None or binary_layers(model) or any(layer.weight.is_meta for layer in packed):
            return None
        now = bits_of(model)
        if now != self.bits:
            has = f"has others ({now[:12]}…)" if now else "has none"
            raise ValueError(
                f"The adapter was trained on the bits of {_quoted(self.name)} (SHA-256 {self.bits[:12]}…), and "
                f"{_quoted(getattr(model, 'name_or_path', None))} {has}: it would add to them what repairs the "
                "others. Load it on the model that it was trained on, or train one for this."
            )
        return None

    def _trained(self, model: Any, adapter_name: str | None) -> dict[str, Tensor]:
        assert self.base is not None
        where, this = f"{str(self.base)!r}", _quoted(getattr(model, "name_or_path", None))
        if not self.base.is_dir():
            raise ValueError(
                f"The adapter was trained with its base, which should be in {where}, and is not there. Load it from "
                "a folder with both; of a repository, what huggingface_hub.snapshot_download gives."
            )
        tensors: dict[str, Tensor] = {}
        for file in weight_files(self.base):
            tensors |= load_file(file)
        bare = without_adapters(model)
        tied: Mapping[str, Any] = getattr(bare, "all_tied_weights_keys", None) or {}
        there = bare.state_dict()
        wrong = [name for name, each in tensors.items() if name not in there or there[name].shape != each.shape]
        wrong += [name for name in there if name not in tensors and name not in tied]
        if wrong:
            raise ValueError(
                f"The adapter was trained with its base, which is in {where}, and {this} is another one ({wrong[0]}). "
                f"Load {where} with from_pretrained, and the adapter on that."
            )
        others = set(getattr(model, "peft_config", {})) - {adapter_name}
        fresh = adapter_name not in getattr(model, "peft_config", {})
        if others and fresh and not all(torch.equal(there[name].cpu(), each) for name, each in tensors.items()):
            raise ValueError(
                f"The adapter was trained with its base, which is in {where}, and {this} has other weights, under "
                f"{', '.join(sorted(others))}. Load it on a model of its own."
            )
        return tensors


def _quoted(name: str | None) -> str:
    return repr(name) if name else "a model without a name"
