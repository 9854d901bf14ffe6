"""A process whose Hub is another: `huggingface_hub` reads its environment when it is imported, once.

Each job, a path to a script on standard input, runs in a process of its own, forked from this one, which has imported
the libraries and done nothing with them: as good as a fresh one without the seconds that the imports take. Jobs in one
line, with tabs between them, run at the same time. `result` is the name by which a script gives back what JSON can
hold; waiting is skipped and recorded in `waits`.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch  # noqa: F401
import transformers  # noqa: F401

import hf_stompp  # noqa: F401


def run(script: Path) -> None:
    waits: list[float] = []
    time.sleep = waits.append
    names: dict[str, Any] = {"result": None}
    answer: dict[str, Any] = {"error": None, "message": None}
    try:
        exec(compile(script.read_text(), str(script), "exec"), names)
    except Exception as error:
        traceback.print_exc()
        answer = {"error": [cls.__name__ for cls in type(error).__mro__], "message": str(error)}
    script.with_suffix(".json").write_text(json.dumps({**answer, "result": names["result"], "waits": waits}))


if __name__ == "__main__":
    for line in sys.stdin:
        children = []
        for script in line.strip().split("\t"):
            children.append(os.fork())
            if children[-1] == 0:
                run(Path(script))
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        print("done", flush=True)
