"""Runs Python programs in forks of this process, which has imported the libraries: a start takes one second, not ten.

    python tests/fork_server.py

Reads one JSON object a line from the standard input, and answers `started PROCESS`, later `ended PROCESS CODE`.
  command       the program and its flags; the program runs as __main__, from its file, as under `python program flags`
  environment   all variables
  output, error files to which the standard streams go

harness.py starts it. What is tested is the same program; only its imports have been made before.
"""

import importlib
import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path

LIBRARIES = (
    "accelerate.hooks",
    "datasets",
    "deepspeed",  # transformers imports it, too, when it saves a model
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
)
ROOT = Path(__file__).resolve().parent.parent


def redirect(stream: int, path: str, mode: int) -> None:
    file = os.open(path, mode, 0o666)
    os.dup2(file, stream)
    os.close(file)


def become(request: dict) -> None:
    """In a fork: runs the program; this process then ends as Python ends, or with its error."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    redirect(0, os.devnull, os.O_RDONLY)
    redirect(1, request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    redirect(2, request["error"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def answer(answers: int, line: str) -> None:
    os.write(answers, f"{line}\n".encode())


def serve(answers: int) -> dict | None:
    """Starts forks and tells their ends; returns in a fork, with what it is to run, and at the end of the input."""
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(ended, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    running = set()
    while True:
        readable, _, _ = select.select([0, ended], [], [])
        if ended in readable:
            os.read(ended, 4096)
        for process in list(running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                running.remove(process)
                answer(answers, f"ended {process} {os.waitstatus_to_exitcode(status)}")
        if 0 not in readable:
            continue
        received = os.read(0, 65536)
        if not received:
            return None
        *lines, unread = (unread + received).split(b"\n")
        for line in lines:
            process = os.fork()
            if process == 0:
                return json.loads(line)
            running.add(process)
            answer(answers, f"started {process}")


def main() -> None:
    os.chdir(ROOT)
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print when they are imported
    for name in LIBRARIES:
        importlib.import_module(name)
    # What the first model that is loaded waits for half a second.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    request = serve(answers)
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
