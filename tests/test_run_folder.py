"""The folder of a run: it has one owner, a former run is moved out of it, and others can read what is in it.

The functions stand alike in every training script (test_scripts.py); here they are taken from finetune_pp.
"""

import importlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import random_rows, run_script, save_rows, save_tiny_model
from harness import STRATEGIES, Runs, newest_complete, start_script, weights_of

import finetune_pp
from finetune_pp import Arguments, claim_folder, expand_home, free_folder, is_finished, set_former_run_aside

FLAGS = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--learning_rate", "1e-2"]


def leave_a_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    (folder / "config.json").write_text("of the former run")


@pytest.fixture
def disk(tmp_path):
    """mount(megabytes): a small file system of its own, as a container's volume is."""
    mounted = []

    def mount(megabytes: float) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 2**20)}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting needs the rights of root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- One owner ---------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner_until_its_process_ends(tmp_path):
    folder = tmp_path / "deep" / "run"
    lock = claim_folder(folder, None)
    with pytest.raises(ValueError, match=f"a run is going on in it .process {os.getpid()} on .*, since 2"):
        claim_folder(folder, None)
    (folder / "model").touch()
    free_folder(lock)
    lock.close()
    assert [path.name for path in folder.iterdir()] == ["model"]
    free_folder(claim_folder(folder, None))
    assert folder.is_dir()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    free_folder(claim_folder(tmp_path / "run", None))
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere, since 2020")
    free_folder(claim_folder(tmp_path, None))


def test_a_second_run_in_the_folder_of_one_that_is_going_on_is_refused(tiny_model, tiny_set, tmp_path):
    """Whatever script it is; the first one goes on, and its folder is not touched."""
    flags = ["--model_path", tiny_model, "--dataset_path", tiny_set, "--output_dir", tmp_path / "out", *FLAGS]
    (first,) = start_script("finetune_pp_peft.py", *flags, "--max_steps", 400, "--save_steps", 10)
    while newest_complete(tmp_path / "out") < 10:
        assert first.poll() is None
        time.sleep(0.02)
    for script, more in (("finetune_pp", []), ("finetune_pp_peft_trainer", ["--resume_from_checkpoint", "True"])):
        second = run_script(f"{script}.py", *flags, "--max_steps", 1, *more, check=False)
        assert second.returncode == 1 and "Traceback" not in second.stderr
        assert f"process {first.pid} on " in second.stderr or "belongs to a run with" in second.stderr
    first.send_signal(15)
    assert first.wait() == 1
    assert not list(tmp_path.glob("out.*"))


# --- A former run ------------------------------------------------------------------------------------------------


def test_a_run_behind_a_link_is_set_aside_and_the_link_stays(tmp_path):
    leave_a_run(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    set_former_run_aside(tmp_path / "link", None)
    assert (tmp_path / "link").is_symlink() and list((tmp_path / "real").iterdir()) == []
    (former,) = tmp_path.glob("real.2*")
    assert (former / "config.json").read_text() == "of the former run"


def test_on_a_mounted_disk_the_former_run_stays_on_it(disk):
    folder = disk(1)
    for number in range(2):
        leave_a_run(folder)
        set_former_run_aside(folder, None)
        assert all(path.name.startswith("former.2") for path in folder.iterdir())
        assert len(list(folder.iterdir())) == number + 1
        time.sleep(1.1)  # the names have seconds


def test_the_folder_that_one_stands_in_is_not_emptied(tmp_path, monkeypatch):
    leave_a_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in (Path("."), tmp_path, tmp_path.parent / tmp_path.name):
        with pytest.raises(ValueError, match="holds a former run, and you are in it; name another"):
            claim_folder(folder, None)
    free_folder(claim_folder(Path("."), tmp_path / "checkpoint-1"))  # but one that is resumed goes on
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~/run", "{home}/run"),
        ("~/a:2,~/b:1", "{home}/a:2,{home}/b:1"),
        ("runs/~/x", "runs/~/x"),
        ("a~/b", "a~/b"),
        ("~", "~"),
        (None, None),
    ],
)
def test_a_home_folder_that_the_shell_left_is_expanded(given, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = expand_home(Arguments(eval_dataset_path=given, output_dir="~/run"))
    assert args.eval_dataset_path == (expanded and expanded.format(home="/home/me"))
    assert args.output_dir == "/home/me/run"


@pytest.mark.parametrize("name", sorted({script for script, _ in STRATEGIES.values()}))
def test_every_flag_that_names_a_file_is_expanded(name):
    script = importlib.import_module(name)
    names = {field for field in vars(script.Arguments()) if field.endswith(("_path", "_dir", "_checkpoint"))}
    names |= {"deepspeed"} & vars(script.Arguments()).keys()
    assert set(script.PATHS) == names


# --- What others can read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_weights_have_the_rights_of_the_files_beside_them(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_tiny_model(tmp_path)
        finetune_pp.let_others_read(tmp_path)
    finally:
        os.umask(before)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Runs:
    """A run of one step by each strategy, in the folder of its name."""
    runs = Runs(tmp_path_factory.mktemp("finished"))
    for strategy in STRATEGIES:
        runs.train(strategy, 1, runs.folder / strategy, "--max_steps", 1, "--save_steps", 1)
    return runs


def test_what_every_script_saves_can_be_read_by_others(finished):
    for strategy in STRATEGIES:
        for path in (finished.folder / strategy).rglob("*.safetensors"):
            beside = next(path.parent.glob("*.json"))
            assert path.stat().st_mode == beside.stat().st_mode, path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_finished_run_that_is_resumed_stays_as_it_is(strategy, finished):
    """A cluster may start it again: that is no mistake, and its receipt still says what training took."""
    out = finished.folder / strategy
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = finished.train(strategy, 1, out, "--max_steps", 1, "--resume_from_checkpoint", "True")
    assert "all 1 steps are trained and saved; nothing to do" in again.output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_taken(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    with pytest.raises(ValueError, match="has taken 5 steps, and these flags ask for 4"):
        is_finished(checkpoint, str(tmp_path), 4)
    assert not is_finished(checkpoint, str(tmp_path), 5)  # a kill came between the last step and its result
    assert not is_finished(checkpoint, str(tmp_path), 6)
    (tmp_path / "run.json").touch()
    assert is_finished(checkpoint, str(tmp_path), 5)


# --- Files of others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_what_is_not_of_a_run_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"it holds {name}, which is not of a run; name another folder"):
        claim_folder(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_log_that_the_shell_writes_into_the_folder_is_no_obstacle(tmp_path):
    (tmp_path / "train.log").touch()
    free_folder(claim_folder(tmp_path, None))


# --- A full disk -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_disk_parts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("full")
    model, rows = save_tiny_model(folder / "model"), save_rows(random_rows(22), folder / "rows")
    flags = ["--model_path", model, "--dataset_path", rows, "--per_device_train_batch_size", 2, "--save_steps", 1]
    return [*map(str, flags), *FLAGS, "--max_steps", "6"]


# How many checkpoints find room: less than one, less than two, all that are kept but not the third, which is written
# before the oldest goes, or all but the model at the end.
ROOM = (0.4, 1.5, 2.3, 3.1)
STARTED = {
    "plain": ("finetune_pp.py", []),
    "plain PEFT": ("finetune_pp_peft.py", []),
    "FSDP2": ("finetune_pp_peft_trainer.py", []),
    "FSDP2+LoRA": ("finetune_pp_peft_trainer_lora.py", []),
    "ZeRO-2": ("finetune_pp_peft_trainer_deepspeed.py", ["--deepspeed", "ds_configs/zero2.json"]),
    "1F1B": ("finetune_pp_1f1b.py", ["--gradient_accumulation_steps", "2"]),
}


@pytest.mark.parametrize(
    ("strategy", "room"),
    [
        pytest.param(strategy, room, marks=[] if (strategy, room) == ("plain PEFT", 1.5) else pytest.mark.slow)
        for strategy in STARTED
        for room in ROOM
        if (strategy, room) != ("1F1B", 3.1)  # beside whose checkpoints the model is small: it finds room
    ],
)
def test_a_full_disk_is_one_message_and_loses_nothing(strategy, room, full_disk_parts, disk, tmp_path):
    """A real file system without room; then room is made, and the resumed run is the uninterrupted one."""
    script, more = STARTED[strategy]
    num_processes = 2 if strategy == "1F1B" else 1
    command = [script, *full_disk_parts, *more]
    run_script(*command, "--output_dir", tmp_path / "whole", num_processes=num_processes)
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-5").rglob("*") if path.is_file())
    folder = disk(size * 10 / 2**20)
    out = folder / "out"
    (folder / "ballast").write_bytes(bytes(int(shutil.disk_usage(folder).free - size * room)))
    resume = [*command, "--output_dir", out, "--resume_from_checkpoint", "True"]
    stopped = run_script(*resume, check=False, num_processes=num_processes)
    assert stopped.returncode == 1, stopped.stderr
    (message,) = [line for line in stopped.stderr.splitlines() if "its disk is full" in line]
    assert f"error: {out} could not be written" in message and "make room" in message
    assert "Traceback" not in stopped.stderr
    kept = {int(path.name[11:]): finetune_pp.find_damage(path) for path in out.glob("checkpoint-*")}
    assert set(kept.values()) <= {None}  # no half checkpoint has the name of a whole one
    print(f"{strategy}, room for {room} checkpoints: stopped with {sorted(kept)}: {message}")

    (folder / "ballast").unlink()
    resumed = run_script(*resume, num_processes=num_processes)
    assert f"resuming from {out}/checkpoint-{max(kept)}\n" in resumed.stdout if kept else "beginning" in resumed.stdout
    whole, again = weights_of(tmp_path / "whole"), weights_of(out)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.loads((out / "run.json").read_text())["world_size"] == num_processes
