"""Makes the runs of a study: each once, several at a time, one line of JSON for each that has ended."""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.reproduce.study import ROOT, Run, Study
from hf_stompp.results import COLLAPSED

RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
PLACES = ("dataset_dir",)
"""Flags that say where something is on this machine, and change no outcome."""
_CURVE = ("loss", "eval_accuracy", "eval_matthews_correlation", "frozen_fraction", "flip_ratio")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, without the half of one that a killed runner may leave."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line break is half a line, or nothing


def run_study(study: Study, results: Path, work_dir: Path, jobs: int, flags: dict[str, Any]) -> None:
    """Makes the runs that have no line in `results` yet, `jobs` at a time.

    A run that was interrupted goes on from its last checkpoint, if its recipe makes any. A run that ends with an error
    has a line that says so, and is made again when the study is run again.

    Args:
        study (`Study`): What to run.
        results (`Path`): File of JSON lines, to which they are added.
        work_dir (`Path`): Where the runs write to, each to a folder of its own.
        jobs (`int`): Runs at a time; they share the processor's threads.
        flags (`dict`): More flags of the recipe, for all runs, as `model_name_or_path`. A run with others is another
            run, but for those in `PLACES`.
    """
    done = {line["identity"] for line in read(results) if line["error"] is None}
    missing = [run for run in study.runs if identity(run, flags) not in done]
    print(f"{study.name}: {len(study.runs)} runs, of which {len(missing)} are to be made; they write to {work_dir}")
    results.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(threads,))
    environment = _environment()  # of the code that runs, whatever is committed meanwhile
    try:
        with tqdm(total=len(missing), desc=study.name) as bar:
            made = {pool.submit(execute, run, str(work_dir / identity(run, flags)), flags): run for run in missing}
            for future in as_completed(made):
                line = {**_described(made[future], flags), **future.result(), **environment}
                _append(results, line)
                bar.update()
                score = line["error"] or f"{line['score']:.3f}"
                bar.write(f"{line['study']} {line['labels']} seed {line['seed']}: {score}, {line['seconds']:.0f} s")
    except BaseException:  # an interrupt, mostly: those that have begun are begun again when the study is
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def identity(run: Run, flags: dict[str, Any]) -> str:
    """Of a run with the flags that its study does not have."""
    more = {name: value for name, value in flags.items() if name not in PLACES}
    return hashlib.sha256(json.dumps([run.key, more], sort_keys=True).encode()).hexdigest()[:16] if more else run.key


def _described(run: Run, flags: dict[str, Any]) -> dict[str, Any]:
    return {
        "study": run.study,
        "labels": run.labels,
        "seed": run.flags["seed"],
        "key": run.key,
        "identity": identity(run, flags),
        "recipe": run.recipe,
        "config": run.config,
        "flags": run.flags,
    }


def _environment() -> dict[str, Any]:
    import torch
    import transformers

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or None,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line, whole and on its own, whatever a killed runner left behind."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


# --- in the processes that run ---------------------------------------------------------------------------------------


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path.insert(0, str(ROOT / "recipes"))
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(threads)
    if (devices := torch.cuda.device_count()) > 1:  # or the Trainer would spread each run over all of them
        number = int(multiprocessing.current_process().name.rsplit("-", 1)[-1])
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % devices)


def _end_with_parent() -> None:
    """A killed runner leaves no workers behind, which would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def execute(run: Run, folder: str, flags: dict[str, Any]) -> dict[str, Any]:
    """One run of its recipe, in this process: its score and curve, or its error."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    results = Path(folder) / "results.json"
    more = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    begin = time.monotonic()
    error = None
    with _output_to(Path(folder) / "log"):
        try:
            importlib.import_module("benchmarks.reproduce.plain")  # for those that train it
            if not results.exists():  # of a run that has ended just before its line was written
                importlib.import_module(run.recipe).main([*run.argv, "--output_dir", folder, *more])
        except (Exception, SystemExit) as failure:  # argparse exits; whatever it is, the other runs go on
            traceback.print_exc()
            error = " ".join(f"{type(failure).__name__}: {failure}".split())
    outcome = {"error": error, "seconds": round(time.monotonic() - begin, 1)}
    return {**outcome, **(_scores(Path(folder)) if error is None else {"score": None, "curve": None})}


def _scores(folder: Path) -> dict[str, Any]:
    """Of the final checkpoint, packed and reloaded where it is binary; and what was logged on the way."""
    results = json.loads((folder / "results.json").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    last = results["rows"][-1]
    metric = next(key for key in last if key not in ("model", "bytes", "eval_seconds"))
    curve = [
        {"step": entry["step"], **{name: entry[name] for name in _CURVE if name in entry}}
        for entry in state["log_history"]
        if any(name in entry for name in _CURVE)
    ]
    return {
        "metric": metric,
        "score": last[metric],
        "latent_score": results["rows"][0][metric],
        "collapsed": last["model"].endswith(COLLAPSED),
        "bytes": last["bytes"],
        **_of_adapter(results),
        "train_seconds": results["train_seconds"],
        "binarization": results["binarization"],  # with the defaults of that day
        "curve": curve,
    }


def _of_adapter(results: dict[str, Any]) -> dict[str, Any]:
    """What it takes, and what its base scores without it."""
    if "adapter" not in results:
        return {}
    *_, base, last = results["rows"]
    metric = next(key for key in last if key not in ("model", "bytes", "eval_seconds"))
    taken = {f"adapter_{key}": results["adapter"][key] for key in ("parameters", "bytes")}
    return {"base_score": base[metric], **taken}


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends all that is printed, also by code that is not Python's, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        with open(path, "a", encoding="utf-8") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            yield
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
