"""Kills: whatever a run is doing when it dies, a folder named checkpoint-<step> is whole, and the next run goes on.

A run is killed before and after single operations of the file system, which watch_files.c counts, and at random
moments. What a kill leaves is what the kernel has been told, also if it is not on the disk yet; that it survives a
power cut, too, is seen from the order of the operations: everything is synced before the rename.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_rows, save_rows, save_tiny_model
from harness import (
    COMMON,
    DPO,
    FSDP,
    LORA,
    PREFERENCES,
    WITHOUT_BITSANDBYTES,
    ZERO,
    Runs,
    history_of,
    newest_complete,
    steps_in,
    weights_of,
)
from preference_rows import random_pairs, save_preferences
from safetensors.torch import load_file

from finetune_pp import find_damage, list_checkpoints  # the same in every script

pytestmark = pytest.mark.slow

NUM_KILLS = 60  # of each script at single operations, spread evenly
# 200 together: 30 of each script, and 4 of each strategy with two processes
NUM_RANDOM_KILLS = 30
NUM_RANDOM_KILLS_OF_TWO = 4
SCRIPTS = {
    "finetune_pp": [],
    "finetune_pp_peft": [],
    "finetune_pp_1f1b": [],
    "finetune_pp_dpo": [],
    FSDP: [],
    LORA: [],
    ZERO: ["--deepspeed", ROOT / "ds_configs" / "zero2.json"],
    DPO: [],
}


# --- Every operation ---------------------------------------------------------------------------------------------


@dataclass
class Operation:
    """What a run did to a file; `inode` is 0 where it was not open."""

    number: int
    name: str
    path: str
    new_path: str
    inode: str


def read_operations(path: Path) -> list[Operation]:
    operations = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        operations.append(Operation(number, *line.split("\t")))
    return operations


class ForkedRuns:
    """Starts runs of one script on a tiny model and 22 rows, one after the other, each killed where it is told."""

    def __init__(self, script: str, folder: Path):
        self.folder = folder
        self.model = save_tiny_model(folder / "model")
        if script in PREFERENCES:
            self.rows = save_preferences(random_pairs(22), folder / "rows")
        else:
            self.rows = save_rows(random_rows(22), folder / "rows")
        self.script = script
        self.script_flags = SCRIPTS[script]
        library = folder / "watch_files.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests" / "watch_files.c", "-ldl"], check=True
        )
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "run_in_forks.py", library, script],
            cwd=ROOT,
            env=os.environ
            | WITHOUT_BITSANDBYTES
            | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, out: Path, *flags, kill_at: int = 0, operations: Path | None = None) -> int:
        """The number of the process that runs the script."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        common = ["--model_path", self.model, "--dataset_path", self.rows, "--output_dir", out, *COMMON]
        request = {
            "flags": [str(flag) for flag in (*common, *self.script_flags, *flags)],
            "folder": str(out),
            "operations": operations and str(operations),
            "kill_at": kill_at,
            "log": str(log),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """The exit code and what the run printed, when it has ended."""
        code = int(self.process.stdout.readline())
        return code, (self.folder / "log").read_text()

    def run(self, out: Path, *flags, kill_at: int = 0, operations: Path | None = None) -> tuple[int, str]:
        """As wait() gives it."""
        self.start(out, *flags, kill_at=kill_at, operations=operations)
        return self.wait()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module", params=SCRIPTS)
def forks(request, tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    runs = ForkedRuns(request.param, tmp_path_factory.mktemp(request.param))
    yield runs
    runs.end()


# Three steps an epoch. A run that starts here resumes at step 2 and keeps one checkpoint: it writes checkpoint-3,
# deletes checkpoint-2, writes checkpoint-4, deletes checkpoint-3, and writes the model and the receipt.
FLAGS = ["--save_steps", 1, "--save_total_limit", 1, "--resume_from_checkpoint", "True"]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def whole(forks) -> Path:
    """The folder of a run that nobody interrupted."""
    code, log = forks.run(forks.folder / "whole", "--max_steps", NUM_STEPS, *FLAGS)
    assert code == 0, log
    return forks.folder / "whole"


@pytest.fixture(scope="module")
def beginning(forks) -> Path:
    """The folder of a run whose second step has just been saved: it was killed there."""
    out = forks.folder / "beginning"
    operations = forks.folder / "operations of the beginning"
    code, log = forks.run(out, "--max_steps", NUM_STEPS, *FLAGS, operations=operations)
    assert code == 0, log
    renames = [op for op in read_operations(operations) if op.name == "rename" and op.new_path == f"{out}/checkpoint-2"]
    assert len(renames) == 1
    shutil.rmtree(out)
    code, log = forks.run(out, "--max_steps", NUM_STEPS, *FLAGS, kill_at=-renames[0].number)
    assert code == -signal.SIGKILL, log
    assert steps_in(out) == {1, 2}
    return out


@pytest.fixture(scope="module")
def operations(forks, beginning) -> list[Operation]:
    """What a run does from the beginning to its end, by paths as in any other run that begins there."""
    out = forks.folder / "watched"
    shutil.copytree(beginning, out)
    path = forks.folder / "operations"
    code, log = forks.run(out, "--max_steps", NUM_STEPS, *FLAGS, operations=path)
    assert code == 0, log
    return read_operations(path)


def assert_whole(checkpoint: Path) -> None:
    """As the scripts judge it, and every tensor of it can be read."""
    assert find_damage(checkpoint) is None, checkpoint
    num_tensors = 0
    for path in checkpoint.rglob("*.safetensors"):
        num_tensors += len(load_file(path))
    for path in checkpoint.rglob("*.pt"):
        num_tensors += len(torch.load(path, map_location="cpu", weights_only=False))  # DeepSpeed's hold objects
    assert num_tensors > 0


def choose_kills(operations: list[Operation]) -> list[int]:
    """Numbers of operations: those that rename, and others at even distances, before; the last write to a file that
    is renamed unseen, after."""
    kills = {op.number for op in operations if op.name == "rename"}
    last_writes = {op.path: op.number for op in operations if op.name == "write" and "/.tmp" in op.path}
    kills.update(-number for number in list(last_writes.values())[:4])
    others = [op.number for op in operations if op.number not in kills]
    num_others = min(len(others), NUM_KILLS - len(kills))
    for i in range(num_others):
        kills.add(others[i * len(others) // num_others])
    return sorted(kills, key=abs)


def test_a_kill_at_any_operation_leaves_whole_checkpoints_and_a_run_that_goes_on(forks, whole, beginning, operations):
    """Each kill is a run of its own. Every sixth is resumed, to what the uninterrupted run is, bit for bit."""
    kills = choose_kills(operations)
    out = forks.folder / "killed"
    newest = Counter()
    for i, kill_at in enumerate(kills):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(beginning, out)
        operation = operations[abs(kill_at) - 1]
        code, log = forks.run(out, "--max_steps", NUM_STEPS, *FLAGS, kill_at=kill_at)
        assert code == -signal.SIGKILL, f"{operation}: {log}"
        checkpoints = list_checkpoints(out)
        assert checkpoints, operation
        for checkpoint in checkpoints:
            assert_whole(checkpoint)
        newest[checkpoints[0].name] += 1
        if i % 6 == 0:
            code, log = forks.run(out, "--max_steps", NUM_STEPS, *FLAGS)
            assert code == 0, f"resuming after a kill at {operation}: {log}"
            assert f"resuming from {checkpoints[0]}\n" in log
            assert_same_run(out, whole)
            left = {NUM_STEPS}
            if checkpoints[0].name == f"checkpoint-{NUM_STEPS}":
                left = steps_in(out) & {NUM_STEPS - 1, NUM_STEPS}  # it had nothing to save, so it deleted nothing
            assert steps_in(out) == left
    print(f"{len(operations)} operations, {len(kills)} kills, newest checkpoints afterwards: {dict(newest)}")
    assert set(newest) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


def assert_same_run(out: Path, expected: Path) -> None:
    """The same history, weights and optimizer, and nothing left of what was interrupted."""
    assert history_of(out) == history_of(expected)
    weights = weights_of(out)
    expected_weights = weights_of(expected)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    assert (out / "run.json").is_file()
    assert not (out / ".writing").exists()
    assert not (out / ".deleting").exists()
    sizes = {}
    for folder in (out, expected):
        checkpoint = folder / f"checkpoint-{NUM_STEPS}"
        sizes[folder] = {path.relative_to(checkpoint): path.stat().st_size for path in checkpoint.rglob("*")}
    assert sizes[out].keys() == sizes[expected].keys()


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(operations):
    """And its name is on the disk before the older checkpoint goes."""
    renames = [op for op in operations if op.name == "rename" and "/.writing/checkpoint-" in op.path]
    renames = [op for op in renames if "/.writing/" not in op.new_path]
    assert [Path(op.new_path).name for op in renames] == ["checkpoint-3", "checkpoint-4"]
    for rename in renames:
        before = [op for op in operations if op.number < rename.number and op.path.startswith(rename.path)]
        written = {}
        changed = {}
        for op in before:
            if op.name == "write":
                written[op.inode] = op
            elif op.name in ("open", "mkdir", "unlink", "rmdir", "rename"):
                changed[str(Path(op.path).parent)] = op
        changed.pop(str(Path(rename.path).parent))  # .writing itself, whose folder only was made in it
        assert len(written) >= 3 and rename.path in changed
        for op in written.values():
            assert any(
                sync.name == "fsync" and sync.inode == op.inode and sync.number > op.number for sync in before
            ), op
        for folder, op in changed.items():
            assert any(sync.name == "fsync" and sync.path == folder and sync.number > op.number for sync in before), op
        out = str(Path(rename.new_path).parent)
        behind = [op for op in operations if op.number > rename.number]
        assert (behind[0].name, behind[0].path) == ("fsync", out)


# --- Random moments ----------------------------------------------------------------------------------------------

# A run of these flags saves after every step, and does not end by itself.
ENDLESS = ["--max_steps", 5000, "--save_steps", 1, "--resume_from_checkpoint", "True"]


def wait_for_a_checkpoint(out: Path, before: int, is_alive) -> None:
    while newest_complete(out) <= before and is_alive():
        time.sleep(0.002)


def assert_all_whole(out: Path, before: int) -> None:
    """There is a newer checkpoint than that of step `before`, and each folder of this name is whole."""
    checkpoints = list_checkpoints(out)
    assert int(checkpoints[0].name[11:]) > before
    for checkpoint in checkpoints:
        assert_whole(checkpoint)


def test_kills_at_random_moments_never_leave_half_a_checkpoint(forks, tmp_path):
    """Each of a run that resumed from what the one before left, and has saved at least one checkpoint of its own."""
    seed = random.randrange(10**6)
    print(f"{forks.script}: seed {seed}")
    chance = random.Random(seed)
    out = tmp_path / "out"
    num_while_saving = 0
    for _ in range(NUM_RANDOM_KILLS):
        before = newest_complete(out)
        process = forks.start(out, *ENDLESS)
        wait_for_a_checkpoint(out, before, lambda process=process: is_running(process))
        time.sleep(chance.uniform(0, 0.3))
        if is_running(process):
            os.kill(process, signal.SIGKILL)
        code, log = forks.wait()
        assert code == -signal.SIGKILL, log
        assert_all_whole(out, before)
        num_while_saving += bool(steps_in(out / ".writing"))
    print(f"{forks.script}: {num_while_saving} of {NUM_RANDOM_KILLS} while a checkpoint was being written")


def is_running(process: int) -> bool:
    """Not a zombie: its parent waits for it."""
    return Path(f"/proc/{process}").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("random kills"))


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA", "ZeRO-2", "ZeRO-3", "1F1B", "ZeRO-3 DPO"])
def test_kills_of_two_processes_at_random_moments_never_leave_half_a_checkpoint(strategy, runs, tmp_path):
    seed = random.randrange(10**6)
    print(f"{strategy}: seed {seed}")
    chance = random.Random(seed)
    out = tmp_path / "out"
    flags = list(ENDLESS)
    if strategy == "1F1B":
        flags += ["--gradient_accumulation_steps", 2]  # a micro-batch for each stage
    num_while_saving = 0
    for _ in range(NUM_RANDOM_KILLS_OF_TWO):
        before = newest_complete(out)
        run = runs.start(strategy, 2, out, *flags)
        wait_for_a_checkpoint(out, before, run.is_alive)
        time.sleep(chance.uniform(0, 0.3))
        was_alive = run.is_alive()
        run.kill()
        assert was_alive, run.log.read_text()
        assert_all_whole(out, before)
        num_while_saving += bool(steps_in(out / ".writing"))
    print(f"{strategy}: {num_while_saving} of {NUM_RANDOM_KILLS_OF_TWO} while a checkpoint was being written")
