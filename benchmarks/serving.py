"""What a server of a packed BERT-base does under load, beside one of the same model in float32.

    pip install fastapi uvicorn
    python benchmarks/serving.py    # two minutes of load by 8 clients

Both are served by `examples/serve.py` and are under load in turn, round by round, so that a machine whose speed drifts
slows both alike. A client sends its next sentence when the last one is answered. Clients run on the same machine, of
which they take little. Weights are random and words made up: speed only. Writes `benchmarks/results/serving.json`.

*Peak memory* is that of a server's process (VmHWM, on Linux), *imports* that of one which has loaded no model.
"""

import argparse
import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from inference import RESULTS, processor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from transformers.utils import logging

from hf_stompp import BinarizationConfig, binarize, calibrate, pack
from hf_stompp.patching import binary_layers

SERVER = Path(__file__).resolve().parents[1] / "examples" / "serve.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of load on each server")
    parser.add_argument("--rounds", type=int, default=4, help="that they are spread over")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--words", type=int, default=30, help="of a sentence, on average")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each server")
    args = parser.parse_args()
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        parser.error(f"the server needs what is not installed: pip install {' '.join(missing)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: no server is left running
    # Settings of malloc would change what it gives back.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folders = [Path(scratch, name) for name in ("packed", "fp32")]
        texts = save(folders[0], folders[1], args.words)
        servers = [Server(folder, environment, stack) for folder in folders]
        for server in servers:
            server.load(texts, args.clients, 2, "warm-up")
            server.latencies, server.errors, server.rounds = [], [], []
        for number in range(args.rounds):
            for server in servers:
                server.load(texts, args.clients, args.seconds / args.rounds, f"round {number + 1} of {args.rounds}")
        rows = [server.row() for server in servers]
    code = f"import runpy; runpy.run_path({str(SERVER)!r}); print(open('/proc/self/status').read())"
    imported = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    result = {"processor": processor(), **vars(args), "imports_mb": peak(imported), "models": rows}
    (RESULTS / "serving.json").write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def peak(status: str) -> float | None:
    """MB in the text of Linux's file about a process."""
    fields = [line.split() for line in status.splitlines()]
    return next((int(words[1]) * 1024 / 1e6 for words in fields if words[0] == "VmHWM:"), None)


def show(result: dict[str, Any]) -> None:
    forms = {"requests_per_second": "{:.1f}", "p50_ms": "{:.0f} ms", "p99_ms": "{:.0f} ms", "errors": "{}"}
    packed, plain = result["models"]
    forms |= {} if plain["peak_mb"] is None else {"peak_mb": "{:.0f} MB"}
    progress("")
    print(f"| | {' | '.join(forms)} |\n|" + "---|" * (len(forms) + 1))
    for row in (packed, plain):
        print(f"| {row['name']} | {' | '.join(form.format(row[key]) for key, form in forms.items())} |")
    ratios = ("" if key == "errors" else f"{packed[key] / plain[key]:.2f}x" for key in forms)
    print(f"| packed / fp32 | {' | '.join(ratios)} |")
    if result["imports_mb"]:
        print(f"\nImports: {result['imports_mb']:.0f} MB.")


def progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)  # the next one replaces it


def save(packed: Path, plain: Path, words: int) -> list[str]:
    """Saves a BERT-base with a tokenizer, packed and in float32; returns sentences that it knows the words of."""
    progress("making the models")
    config, draw = BertConfig(), random.Random(0)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += map("".join, itertools.islice(itertools.product(syllables, repeat=3), config.vocab_size - 5))
    tokenizer = BertTokenizer({word: code for code, word in enumerate(vocabulary)}, model_max_length=512)
    lengths = range(words - words // 6, words + words // 6 + 1)
    texts = [" ".join(draw.choices(vocabulary[5:], k=draw.choice(lengths))) for _ in range(1000)]
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(plain)
    binarize(model, BinarizationConfig())
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=0)
    calibrate(model, tokenizer(texts[:8], padding=True, return_tensors="pt"))
    pack(model).save_pretrained(packed)
    for folder in (plain, packed):
        tokenizer.save_pretrained(folder)
    return texts


class Server:
    """A server of the model in a folder, which runs until the stack is closed, and what has become of requests."""

    def __init__(self, folder: Path, environment: dict[str, str], stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.latencies: list[float] = []
        self.errors: list[str] = []
        self.rounds: list[tuple[int, float]] = []  # requests and seconds
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(SERVER), str(folder), f"--port={self.port}"]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        stack.callback(process.wait)
        stack.callback(process.kill)  # the last one first
        self.status = Path(f"/proc/{process.pid}/status")
        while self.ask(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60), "GET", "/health"):
            progress(f"{folder.name}: starting, half a minute where kernels have to be compiled")
            if process.poll() is not None:
                raise SystemExit(f"\nthe server did not start:\n{(folder / 'log').read_text()}")
            time.sleep(0.2)

    def ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> str:
        """What went wrong with a request, or nothing."""
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            return "" if response.status == 200 else f"{response.status}: {answer.decode()}"
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return repr(error)

    def load(self, texts: list[str], clients: int, seconds: float, name: str) -> None:
        """Sends it texts for some time."""
        stop, start, before = threading.Event(), time.perf_counter(), len(self.latencies)
        with ThreadPoolExecutor(clients) as pool:
            try:
                jobs = [pool.submit(self._client, texts[i::clients], stop) for i in range(clients)]
                while (left := start + seconds - time.perf_counter()) > 0:
                    progress(f"{self.folder.name}, {name}: {len(self.latencies) - before} requests, {left:.0f} s left")
                    time.sleep(min(1, left))
            finally:
                stop.set()
        for job in jobs:
            job.result()
        self.rounds.append((len(self.latencies) - before, time.perf_counter() - start))
        if len(self.latencies) == before:
            raise SystemExit(f"\nno request was answered: {self.errors[-1]}\n{(self.folder / 'log').read_text()}")

    def _client(self, texts: list[str], stop: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        for text in itertools.takewhile(lambda _: not stop.is_set(), itertools.cycle(texts)):
            start = time.perf_counter()
            if error := self.ask(connection, "POST", "/predict", {"text": text}):
                self.errors.append(error)
                stop.wait(0.1)
            else:
                self.latencies.append(time.perf_counter() - start)

    def row(self) -> dict[str, Any]:
        return {
            "name": self.folder.name,
            "requests_per_second": len(self.latencies) / sum(seconds for _, seconds in self.rounds),
            "of_each_round": [requests / seconds for requests, seconds in self.rounds],
            "p50_ms": 1e3 * statistics.median(self.latencies),
            "p99_ms": 1e3 * sorted(self.latencies)[int(0.99 * len(self.latencies))],
            "errors": len(self.errors),
            "peak_mb": peak(self.status.read_text()) if self.status.exists() else None,
        }


if __name__ == "__main__":
    main()
