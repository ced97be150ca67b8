"""Starts runs of the scripts as a user does, kills them, and reads what they left.

run_script starts a program and waits for it. Runs starts training runs with one or more processes: by torchrun, or by
the scripts' own main() in processes that are forked from one that has imported them, where a start costs one second
instead of ten. What happens inside such a run is seen by a probe: a function of a test that wraps one of the script's
own before main() begins.
"""

import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
# For programs that tests start (not for the workers of xdist, which inherit the environment, too): see the file there.
WITHOUT_BITSANDBYTES = {"PYTHONPATH": str(ROOT / "tests" / "without_bitsandbytes")}
FSDP, LORA, ZERO = "finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora", "finetune_pp_peft_trainer_deepspeed"
DPO = "finetune_pp_dpo_trainer"
STRATEGIES = {
    "FSDP2": (FSDP, []),
    "FSDP2+LoRA": (LORA, []),
    "ZeRO-2": (ZERO, ["--deepspeed", "{zero2}"]),
    "ZeRO-3": (ZERO, ["--deepspeed", "{zero3}"]),
    "ZeRO-3+LoRA": (ZERO, ["--deepspeed", "{zero3}", "--lora_used", "True"]),
    "1F1B": ("finetune_pp_1f1b", []),
    "1F1B+LoRA": ("finetune_pp_1f1b", ["--lora_used", "True"]),
    "plain": ("finetune_pp", []),
    "plain PEFT": ("finetune_pp_peft", []),
    "FSDP2+LoRA DPO": (DPO, ["--dataset_path", "{pairs}"]),
    "ZeRO-3 DPO": (DPO, ["--dataset_path", "{pairs}", "--deepspeed", "{zero3}", "--lora_used", "False"]),
}
PREFERENCES = ("finetune_pp_dpo", DPO)  # scripts that learn from pairs
NUM_STEPS = 12  # four epochs of three steps
COMMON = ["--learning_rate", 1e-2, "--use_cpu", "True", "--report_to", "none", "--bf16", "False"]


class ForkServer:
    """tests/fork_server.py. It ends with the worker of pytest that has started it."""

    def __init__(self):
        command = [sys.executable, ROOT / "tests" / "fork_server.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | WITHOUT_BITSANDBYTES
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, bufsize=0, **pipes)
        self.unread = b""
        self.started = []
        self.codes = {}  # of the processes that have ended

    def start(self, **request) -> int:
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        while not self.started:
            self.read_answers()
        return self.started.pop()

    def read_answers(self, timeout: float | None = None) -> None:
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return
        received = self.process.stdout.read(65536)
        assert received, "tests/fork_server.py has ended"
        *lines, self.unread = (self.unread + received).split(b"\n")
        for line in lines:
            kind, process, *code = line.split()
            if kind == b"started":
                self.started.append(int(process))
            else:
                self.codes[int(process)] = int(code[0])


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()


class Forked:
    """A program of the toolkit that runs in a fork; like subprocess.Popen."""

    def __init__(self, command, output: Path, error: Path, **environment):
        command = [str(part) for part in command]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.server = fork_server()
        self.pid = self.server.start(command=command, environment=environment, output=str(output), error=str(error))
        self.returncode = None

    def poll(self) -> int | None:
        self.server.read_answers(timeout=0)
        if self.pid in self.server.codes:
            self.returncode = self.server.codes.pop(self.pid)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            self.server.read_answers(timeout=1)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def environments(num_processes: int) -> list[dict[str, str]]:
    """What torchrun gives each of its processes; nothing to one that runs alone."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def start_script(*command, output: Path = Path(os.devnull), error: Path = Path(os.devnull), num_processes: int = 1):
    """Starts a program in forks: as `python program flags`, or as torchrun would with several processes."""
    return [Forked(command, output, error, **rank) for rank in environments(num_processes)]


def run_script(
    *command, check: bool = True, num_processes: int = 1, fresh: bool = False, **environment
) -> subprocess.CompletedProcess:
    """Runs a program of the toolkit as a user would: `run_script("finetune_pp.py", "--max_steps", 3)`.

    It runs in a fork of a process that has the libraries, unless it is to be `fresh` or has an environment of its own.
    The first of several processes that fails ends the others, as under torchrun.
    """
    if fresh or environment:
        completed = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | WITHOUT_BITSANDBYTES | environment,
            capture_output=True,
            text=True,
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            output, error = Path(folder, "output"), Path(folder, "error")
            processes = start_script(*command, output=output, error=error, num_processes=num_processes)
            while None in [process.poll() for process in processes] and not any(p.returncode for p in processes):
                processes[0].server.read_answers(timeout=1)
            for process in processes:
                process.send_signal(signal.SIGKILL)
            codes = [process.wait() for process in processes]
            code = next((code for code in codes if code not in (0, -signal.SIGKILL)), max(codes, key=abs))
            completed = subprocess.CompletedProcess(command, code, output.read_text(), error.read_text())
    if check and completed.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{completed.stdout}\n{completed.stderr}")
    return completed


class Run:
    """The processes of a run: forked ones, or torchrun's workers, whose process groups are their own."""

    def __init__(self, log: Path, forked=(), torchrun: psutil.Popen | None = None):
        self.log, self.forked, self.torchrun = log, forked, torchrun

    def workers(self) -> list[psutil.Process]:
        return self.torchrun.children() if self.torchrun else [psutil.Process(one.pid) for one in self.forked]

    def is_alive(self) -> bool:
        return self.torchrun.poll() is None if self.torchrun else self.forked[0].is_alive()

    def kill(self, workers=()) -> None:
        """SIGKILL for all at once; returns when they are gone."""
        workers = workers or (self.workers() if self.is_alive() else [])
        for process in (*workers, *([self.torchrun] if self.torchrun else self.forked)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.forked:
            process.join()
        if self.torchrun:
            self.torchrun.wait()
        assert not psutil.wait_procs(workers, timeout=30)[1]

    def finish(self, check: bool = True):
        """Waits for the end, with `codes` (exit codes) and `output`; a run that hangs is killed."""
        deadline = time.monotonic() + 240
        try:
            while any(process.is_alive() for process in self.forked) or self.is_alive():
                assert time.monotonic() < deadline, f"hangs:\n{self.log.read_text()}"
                time.sleep(0.02)
        finally:
            self.kill()
        self.codes = [self.torchrun.returncode] if self.torchrun else [process.exitcode for process in self.forked]
        self.output = self.log.read_text()
        assert not check or set(self.codes) == {0}, self.output
        return self


def run_main(script: str, flags: list[str], environment: dict, log: Path, probe=None, *context) -> None:
    """In a forked process: what `python script.py flags` does."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ |= environment
    sys.argv = [f"{script}.py", *flags]
    module = importlib.import_module(script)
    if probe:
        probe(module, *context)
    module.main()
    if hasattr(module, "leave"):  # the scripts of several processes
        module.leave()
    atexit._run_exitfuncs()  # multiprocessing ends its processes without


class Runs:
    """Starts runs on a tiny model and 22 rows: by default eight rows a step under two processes."""

    def __init__(self, folder: Path):
        from conftest import random_rows, save_rows, save_tiny_model  # which imports this module
        from preference_rows import random_pairs, save_preferences

        self.folder, self.made = folder, {}
        self.parts = {"tied": save_tiny_model(folder / "tied", tied=True), "untied": save_tiny_model(folder / "untied")}
        self.parts |= {"rows": save_rows(random_rows(22), folder / "rows")}
        self.parts |= {"eval": save_rows(random_rows(7, seed=3), folder / "eval")}
        self.parts |= {"pairs": save_preferences(random_pairs(22), folder / "pairs")}
        for stage in (2, 3):
            config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
            if stage == 3:  # else DeepSpeed would leave the tensors of a small model whole
                config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            self.parts[f"zero{stage}"] = folder / f"zero{stage}.json"
            self.parts[f"zero{stage}"].write_text(json.dumps(config))
        self.forks = multiprocessing.get_context("forkserver")
        scripts = [script for script, _ in STRATEGIES.values()]
        self.forks.set_forkserver_preload([*scripts, "deepspeed", __name__])
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            first = self.forks.Process(target=os.getpid)  # starts the server, which keeps this environment
            first.start()
            first.join()

    def flags(self, strategy: str, out: Path, *more) -> list[str]:
        """Later flags win over earlier ones; {tied}, {rows} and so on name the parts."""
        flags = ["--model_path", "{untied}", "--dataset_path", "{rows}", "--per_device_train_batch_size", 4, *COMMON]
        flags += [*STRATEGIES[strategy][1], "--output_dir", out, *more]
        return [str(flag).format(**self.parts) for flag in flags]

    def start(self, strategy: str, num_ranks: int, out: Path, *flags, probe=()) -> Run:
        log = self.folder / f"{time.monotonic_ns()}.log"
        script, flags = STRATEGIES[strategy][0], self.flags(strategy, out, *flags)
        forked = [
            self.forks.Process(target=run_main, args=(script, flags, rank, log, *probe))
            for rank in environments(num_ranks)
        ]
        for process in forked:
            process.start()
        return Run(log, forked)

    def launch(self, strategy: str, out: Path, *flags, script: str | Path = "") -> Run:
        """By torchrun with two processes, as a user does."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(script or f"{STRATEGIES[strategy][0]}.py"), *self.flags(strategy, out, *flags)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            return Run(log, torchrun=psutil.Popen(command, cwd=ROOT, env=environment, **streams))

    def train(self, strategy: str, num_ranks: int, out: Path, *flags, probe=(), check: bool = True) -> Run:
        return self.start(strategy, num_ranks, out, *flags, probe=probe).finish(check)

    def whole(self, *run) -> Path:
        """The folder of an uninterrupted run with all its checkpoints: (strategy, processes, flags ...), run once."""
        if run not in self.made:
            self.made[run] = self.folder / f"whole-{len(self.made)}"
            strategy, num_ranks, *flags = run
            flags = ["--max_steps", NUM_STEPS, "--save_steps", 1, "--save_total_limit", 999, *flags]
            self.train(strategy, num_ranks, self.made[run], *flags)
        return self.made[run]


def steps_in(folder: Path) -> set[int]:
    """Steps of the checkpoint folders in `folder`, which may come and go."""
    with contextlib.suppress(FileNotFoundError):
        return {int(name[11:]) for name in os.listdir(folder) if name.startswith("checkpoint-")}
    return set()


def newest_complete(out: Path) -> int:
    return max(steps_in(out), default=0)


def is_being_saved(out: Path) -> bool:
    """Whether a checkpoint beyond the newest complete one is being written."""
    return max(steps_in(out / ".writing"), default=0) > newest_complete(out)


def kill(run: Run, out: Path, while_saving: bool, after_step: int) -> bool:
    """SIGKILL beyond `after_step`, at a random moment or while a checkpoint is being written; whether it hit that."""
    workers, delay = [], random.uniform(0, 0.5)
    try:
        while run.is_alive():
            newest = newest_complete(out)
            workers = workers or (run.workers() if newest else [])
            if not while_saving and newest > after_step:
                time.sleep(delay)
                return run.is_alive()
            if while_saving and newest >= after_step and is_being_saved(out):
                run.kill(workers)
                return is_being_saved(out)  # else it was completed in the last moment
        return False
    finally:
        run.kill(workers)


def history_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in history_of(folder)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that was trained, from a run's folder or a checkpoint."""
    trainable = folder / "trainable.safetensors"
    return load_file(trainable if trainable.is_file() else folder / "model.safetensors")


def assert_identical(found: Path, expected: Path) -> None:
    assert [row["step"] for row in history_of(found)] == list(range(1, len(history_of(expected)) + 1))
    assert history_of(found) == history_of(expected)
    mine, theirs = weights_of(found), weights_of(expected)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (found / "run.json").is_file()
