"""Runs a training script in forks of this process, which imports it once; test_kills.py starts it with watch_files.c.

    LD_PRELOAD=watch_files.so python tests/run_in_forks.py watch_files.so SCRIPT

Reads one JSON object a line from the standard input, and answers each with two lines: the process that runs it, and
its exit code when it has ended.
  flags       the command line of the script
  folder      what the run does to files below it is counted
  operations  where the list of these operations is written, or null
  kill_at     the run is killed before the operation of that number, after it if the number is negative, never if 0
  log         what the run prints
"""

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def run(script, library: ctypes.CDLL, request: dict) -> None:
    """In a fork: what `python script.py flags` does."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    record = -1
    if request["operations"]:
        record = os.open(request["operations"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    library.watch(request["folder"].encode(), record, ctypes.c_long(request["kill_at"]))
    sys.argv = [f"{script.__name__}.py", *request["flags"]]
    code = 1
    try:
        script.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a fork of a process that has threads cannot end in Python's own way


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    script = importlib.import_module(sys.argv[2])
    if "deepspeed" in script.__name__:
        importlib.import_module("deepspeed")  # the script imports it late
    answers = os.dup(1)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            run(script, library, json.loads(line))
        os.write(answers, f"{process}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.write(answers, f"{code}\n".encode())


if __name__ == "__main__":
    main()
