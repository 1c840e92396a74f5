"""Python commands in forks of one process that has imported what they all need: each starts at once, not after seconds.

    process = forks.start(["-m", "fused_rlhf.trainers.cli", "grpo"], cwd, {"OMP_NUM_THREADS": "1"}, log)
    assert process.wait() == 0, log.read_text()

A fork has a working directory, an environment, arguments and output of its own, begins with no state of the tests, and can
be killed. Not for tests of what an import pulls in.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ("accelerate", "datasets", "peft", "transformers", "tyro")  # nothing of ours: it is imported anew in each


class Fork:
    """As much of subprocess.Popen as the tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, signal: int) -> None:
        if self.poll() is None:  # the server alone collects it, so the number cannot be another process's yet
            os.kill(self.pid, signal)


_server: subprocess.Popen[str] | None = None


def ask(request: dict[str, Any]) -> Any:
    global _server
    if _server is None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.forks"]
        pipe = subprocess.PIPE
        _server = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=pipe, stdout=pipe)
        atexit.register(_server.stdin.close)  # which ends it
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return json.loads(_server.stdout.readline())


def start(arguments: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> Fork:
    """`python *arguments` (-m MODULE, -c CODE or a script); `env` is added to this environment, output goes to `log`."""
    full = {**os.environ, **env}
    request = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "env": full, "log": str(log)}
    return Fork(ask(request))


def serve() -> list[str]:
    """Answer requests until there are no more; -> in each fork, what it is to run."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what an import prints is no answer
        preload()
        for line in iter(sys.stdin.readline, ""):
            request = json.loads(line)
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if answer == 0:
                    become(request)
                    return request["arguments"]
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    sys.exit()


def preload() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    transformers = sys.modules["transformers"]
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)  # which imports it


def become(request: dict[str, Any]) -> None:
    import torch

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    torch.set_num_threads(int(request["env"].get("OMP_NUM_THREADS", 1)))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)


def execute(arguments: list[str]) -> None:
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    execute(serve())
