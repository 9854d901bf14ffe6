"""A process that has imported the libraries, and done nothing with them, runs jobs in processes forked from it: as
good as fresh ones without the seconds that the imports take.

Each line of standard input is a job in JSON: `call` is the name of a function of `training_jobs`, `arguments` are its
own, `processes` is of how many a group consists, `out` where each writes what the function returns: `OUT.RANK`. The
answer is a line with what became of each: 0, 1 for an error, or the negative number of the signal that killed it.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

import torch
import training_jobs


def run(job: dict[str, Any], rank: int, port: int) -> int:
    if job["processes"] > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in group.items()}})
    try:
        result: Any = getattr(training_jobs, job["call"])(**job["arguments"])
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    torch.save(result, f"{job['out']}.{rank}")
    return 1 if "error" in result else 0


def outcome(children: list[int]) -> list[int]:
    """How each has ended; where one fails, the others may wait for it without end, and are killed after a while."""
    ended: dict[int, int] = {}
    last = None
    while len(ended) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ended[child] = os.waitstatus_to_exitcode(status)
            last = last or (time.monotonic() + 10 if ended[child] != 0 else None)
        elif last is not None and time.monotonic() > last:
            for other in set(children) - ended.keys():
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return [ended[child] for child in children]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(2, 1)  # what jobs print is for whoever reads the log
    for line in sys.stdin:
        job, port, children = json.loads(line), free_port(), []
        for rank in range(job["processes"]):
            children.append(os.fork())
            if children[-1] == 0:
                sys.stdout.flush()
                code = run(job, rank, port)
                sys.stderr.flush()
                os._exit(code)
        os.write(answers, (json.dumps(outcome(children)) + "\n").encode())
