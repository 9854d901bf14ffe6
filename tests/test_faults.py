"""Packed checkpoints on shared, read-only and full disks, and when their writer is killed: an error or a whole one."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from hf_stompp import pack
from hf_stompp.checkpoint import load_complete, whole_folder

Run = Callable[[str], dict[str, Any]]
RunAll = Callable[..., list[dict[str, Any]]]
REPO = "user/tiny-1bit"


@pytest.fixture
def mounts(run: Run) -> None:
    """Skips a test that needs a disk of its own where there can be none."""
    if sys.platform != "linux":
        pytest.skip("disks of a test's own, full or read-only, are made with mounts of Linux")
    done = run("from mounts import private_mounts\nprivate_mounts()")
    if done["error"] is not None:
        pytest.skip(f"a process may not mount disks here: {done['message']}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- loading ---------------------------------------------------------------------------------------------------------

PULL = """
import threading, time
import huggingface_hub.constants
import torch
from transformers import AutoModelForSequenceClassification
huggingface_hub.constants.HF_HUB_OFFLINE = {offline}
time.sleep = lambda seconds: threading.Event().wait(seconds)  # the download waits for a lock
model = AutoModelForSequenceClassification.from_pretrained({repo!r}, cache_dir={cache!r})
torch.save(model.state_dict(), {output!r})
"""


def assert_same_as_file(state: Path, folder: Path) -> None:
    pulled, expected = torch.load(state), load_file(folder / "model.safetensors")
    assert pulled.keys() == expected.keys()
    assert all(torch.equal(pulled[key], expected[key]) for key in expected)


def test_processes_that_fill_one_cache_at_once(
    hub: LoopbackHub, run_all: RunAll, packed_folder: Path, tmp_path: Path
) -> None:
    hub.create(REPO, contents(packed_folder))
    cache, outputs = str(tmp_path / "cache"), [tmp_path / f"{i}.pt" for i in range(4)]
    codes = [PULL.format(repo=REPO, cache=cache, offline=False, output=str(output)) for output in outputs]
    for done, output in zip(run_all(*codes), outputs, strict=True):
        assert done["error"] is None, done["message"]
        assert_same_as_file(output, packed_folder)


def test_a_read_only_cache(hub: LoopbackHub, mounts: None, run: Run, packed_folder: Path, tmp_path: Path) -> None:
    hub.create(REPO, contents(packed_folder))
    cache, output = tmp_path / "cache", tmp_path / "model.pt"
    pull = PULL.format(repo=REPO, cache=str(cache), offline=False, output=str(output))
    assert run(pull)["error"] is None
    output.unlink()
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    requests = len(hub.requests)
    pull = PULL.format(repo=REPO, cache=str(cache), offline=True, output=str(output))
    check = f"import os, mounts\nmounts.read_only({str(cache)!r})\nresult = os.access({str(cache)!r}, os.W_OK)\n"
    done = run(check + pull)
    assert done["error"] is None and done["result"] is False, done["message"]
    assert_same_as_file(output, packed_folder)
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*")} == before
    assert len(hub.requests) == requests


# --- saving on a full disk -------------------------------------------------------------------------------------------

# Of two pages, config.json takes the first; of five, the weights do not fit into the others.
LEFT = [0, 4096, 2 * 4096, 5 * 4096]

SAVE = """
import shutil
from pathlib import Path
import hf_stompp
from hf_stompp.checkpoint import load_complete, whole_folder
from mounts import fill, small_disk
from transformers import AutoModelForSequenceClassification

def failure(call):
    try:
        call()
    except Exception as error:
        return str(error)

latent = AutoModelForSequenceClassification.from_pretrained({latent!r})
old = hf_stompp.pack(latent)
latent.classifier.bias.data.add_(1)
new = hf_stompp.pack(latent)
disk = Path({disk!r})
small_disk(str(disk), 256 * 1024)
folder, result = disk / "packed", []

def save_whole():
    with whole_folder(folder) as draft:
        new.save_pretrained(draft)

def contents():
    return {{path.name: path.read_bytes() for path in folder.iterdir()}}

for left in {left!r}:
    {body}
    result.append(found)
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
"""


@pytest.fixture
def save_on_full_disk(
    mounts: None, run: Run, frozen_bert: PreTrainedModel, tmp_path: Path
) -> Callable[[str], list[Any]]:
    """Runs code for each space that is `left` on a disk; what it `found`."""
    frozen_bert.save_pretrained(tmp_path / "latent")
    (tmp_path / "disk").mkdir()

    def call(body: str) -> list[Any]:
        paths = {"latent": str(tmp_path / "latent"), "disk": str(tmp_path / "disk")}
        done = run(SAVE.format(**paths, left=LEFT, body=body.replace("\n", "\n    ")))
        assert done["error"] is None, done["message"]
        return done["result"]

    return call


def test_what_a_full_disk_leaves_is_refused(hub: LoopbackHub, save_on_full_disk: Callable[[str], list[Any]]) -> None:
    found = save_on_full_disk(
        "fill(disk, left)\n"
        "found = [failure(lambda: new.save_pretrained(folder))]\n"
        "found.append(failure(lambda: AutoModelForSequenceClassification.from_pretrained(folder)))\n"
        f"found += [failure(lambda: load_complete(folder)), failure(lambda: hf_stompp.push(folder, {REPO!r}))]"
    )
    for error, loading, complete, push in found:
        assert "No space left on device" in error and loading
        assert re.search(r"incomplete|truncated or corrupted|There is no folder", complete), complete
        assert push == complete
    assert not hub.repos


def test_a_good_checkpoint_survives_a_full_disk(save_on_full_disk: Callable[[str], list[Any]]) -> None:
    found = save_on_full_disk(
        "old.save_pretrained(folder)\n"
        "before = contents()\n"
        "fill(disk, left)\n"
        "error = failure(save_whole)\n"
        "found = [error, contents() == before, sorted(path.name for path in disk.iterdir())]"
    )
    for error, same, there in found:
        assert re.search(r"packed could not be written: .*No space left.* It is as it was before. If", error)
        assert same and there == ["filler", "packed"]


def test_saving_over_a_checkpoint_on_a_full_disk_mixes_no_weights(
    save_on_full_disk: Callable[[str], list[Any]],
) -> None:
    # As users do it, without `whole_folder`: what loads afterwards, if anything does, has the old weights.
    found = save_on_full_disk(
        "old.save_pretrained(folder)\n"
        "weights = contents()['model.safetensors']\n"
        "fill(disk, left)\n"
        "error = failure(lambda: new.save_pretrained(folder))\n"
        "same = contents()['model.safetensors'] == weights\n"
        "found = [error, same or failure(lambda: load_complete(folder))]"
    )
    for error, safe in found:
        assert "No space left on device" in error and safe


# --- a recipe that is killed -----------------------------------------------------------------------------------------

RECIPE = """
import os, signal
from pathlib import Path
import transformers
from recipe_utils import pack_and_reload
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

folder = Path({output!r}) / "packed"
model = AutoModelForSequenceClassification.from_pretrained({latent!r})
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
trainer = Trainer(model, TrainingArguments({output!r}, use_cpu=True, report_to=[]), processing_class=tokenizer)
{fault}
pack_and_reload(trainer, folder, AutoModelForSequenceClassification)
"""
FAULTS = {
    "before the weights": "transformers.modeling_utils.safe_save_file = kill",
    "before the tokenizer": "type(tokenizer).save_pretrained = kill",
    "before the last rename": "rename = Path.rename\n"
    "Path.rename = lambda path, to: kill() if path.name.endswith('.draft') else rename(path, to)",
}


@pytest.mark.parametrize("again", [False, True], ids=["new", "over an old one"])
def test_a_killed_recipe_leaves_a_whole_checkpoint_or_none(
    again: bool, run_all: RunAll, frozen_bert: PreTrainedModel, packed_folder: Path, tmp_path: Path
) -> None:
    frozen_bert.save_pretrained(tmp_path / "latent")
    paths = {"latent": str(tmp_path / "latent"), "tokenizer": str(packed_folder)}
    outputs = {fault: tmp_path / f"out{i}" for i, fault in enumerate(FAULTS)}
    before = contents(packed_folder)
    for output in outputs.values():
        output.mkdir()
        if again:
            shutil.copytree(packed_folder, output / "packed")
    answers = run_all(*(RECIPE.format(fault=FAULTS[f], output=str(o), **paths) for f, o in outputs.items()))
    assert [answer["error"] for answer in answers] == 3 * [["killed"]]
    for fault, output in outputs.items():
        assert {path.name for path in output.iterdir()} - {"packed"}, "it was killed in time"
        if (output / "packed").exists():
            assert again and fault != "before the last rename" and contents(output / "packed") == before
        # An error now: what was there is there again. Then success, and nothing else is left.
        with pytest.raises(ZeroDivisionError), whole_folder(output / "packed"):
            raise ZeroDivisionError
        assert (output / "packed").exists() == again and (not again or contents(output / "packed") == before)
        with whole_folder(output / "packed") as draft:
            pack(frozen_bert).save_pretrained(draft)
            AutoTokenizer.from_pretrained(packed_folder).save_pretrained(draft)
        assert [path.name for path in output.iterdir()] == ["packed"]
        load_complete(output / "packed")
