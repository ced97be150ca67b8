"""Checkpoints, receipts and former runs: the functions that stand alike in every training script.

test_scripts.py says that they are alike; here they are taken from finetune_pp. What kills leave is in test_kills.py.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_rows, save_rows
from safetensors.torch import save_file

import finetune_pp
from data_collator import TokenizedDataset, TrainingRows
from finetune_pp import (
    Arguments,
    delete_checkpoint,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    publish_checkpoint,
    read_settings,
    resume_settings,
    set_former_run_aside,
    start_checkpoint,
    write_receipt,
)

FILES = ["model.safetensors", "training_state.pt", "trainer_state.json", "optimizer_0/__0_0.distcp"]


@pytest.fixture
def args(tmp_path) -> Arguments:
    return Arguments(output_dir=str(tmp_path / "run"), save_total_limit=9)


@pytest.fixture
def rows(tiny_set) -> TrainingRows:
    return TrainingRows(TokenizedDataset(tiny_set), rows_per_step=8, num_train_epochs=1, max_steps=-1, seed=42)


@pytest.fixture
def settings(args, rows) -> dict:
    return resume_settings(args, rows)


def write_files(folder: Path, step: int) -> None:
    """Files of every kind that a checkpoint holds, one in a folder of its own."""
    save_file({"weight": torch.full((40, 8), float(step))}, folder / "model.safetensors")
    torch.save({"optimizer": torch.arange(300)}, folder / "training_state.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "__0_0.distcp").write_bytes(bytes(range(256)))


def save_checkpoint(args: Arguments, settings: dict, step: int) -> Path:
    folder = start_checkpoint(args, step)
    write_files(folder, step)
    publish_checkpoint(args, folder, settings)
    return Path(args.output_dir) / f"checkpoint-{step}"


def interrupt_checkpoint(args: Arguments, step: int) -> Path:
    """What a kill leaves while a checkpoint is being written."""
    folder = start_checkpoint(args, step)
    write_files(folder, step)
    return folder


def names(output_dir: str) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir)]


# --- Writing -----------------------------------------------------------------------------------------------------


def test_a_published_checkpoint_is_whole_and_knows_the_size_of_every_file(args, settings):
    checkpoint = save_checkpoint(args, settings, 3)
    assert find_damage(checkpoint) is None
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {*FILES, "settings.json"}
    written = read_settings(checkpoint)
    assert written["settings"] == settings
    assert written["file_sizes"].keys() == files - {"settings.json"}
    assert written["file_sizes"]["optimizer_0/__0_0.distcp"] == 256
    assert written["file_sizes"]["trainer_state.json"] == len('{"global_step": 3}')


def test_a_checkpoint_has_its_name_only_when_it_is_published(args, settings):
    folder = interrupt_checkpoint(args, 3)
    assert names(args.output_dir) == []
    assert not list(Path(args.output_dir).glob("checkpoint-*"))
    publish_checkpoint(args, folder, settings)
    assert names(args.output_dir) == ["checkpoint-3"]
    assert not list((Path(args.output_dir) / ".writing").iterdir())


def test_what_an_interrupted_run_left_goes_with_the_next_checkpoint(args, settings):
    left = interrupt_checkpoint(args, 3)
    checkpoint = save_checkpoint(args, settings, 4)
    assert not left.exists()
    assert names(args.output_dir) == ["checkpoint-4"]
    assert find_damage(checkpoint) is None
    interrupt_checkpoint(args, 5)  # and is no part of a checkpoint of the same step
    (Path(args.output_dir) / ".writing" / "checkpoint-5" / "stale.bin").write_bytes(b"stale")
    assert not (save_checkpoint(args, settings, 5) / "stale.bin").exists()


def test_every_file_and_folder_is_synced_before_the_rename_and_the_name_after_it(args, settings, monkeypatch):
    """Else a power cut could leave a checkpoint with its name and without its bytes."""
    steps = []
    fsync = os.fsync
    rename = Path.rename

    def note_fsync(descriptor: int) -> None:
        steps.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        steps.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    args = replace(args, save_total_limit=1)
    save_checkpoint(args, settings, 1)
    steps.clear()
    save_checkpoint(args, settings, 2)
    folder = Path(args.output_dir) / ".writing" / "checkpoint-2"
    written = [*FILES, "settings.json", "optimizer_0"]
    before = {path for step, path in steps[:7] if step == "sync"}
    assert before == {str(folder)} | {str(folder / name) for name in written}
    assert steps[7:9] == [("rename", f"{args.output_dir}/checkpoint-2"), ("sync", args.output_dir)]
    assert ("rename", f"{args.output_dir}/.deleting") in steps[9:]  # the older one goes after that


def test_a_checkpoint_of_the_same_step_is_replaced(args, settings):
    """A run that went on from an older one, because this one was damaged, gets there again."""
    checkpoint = save_checkpoint(args, settings, 3)
    (checkpoint / "model.safetensors").unlink()
    assert find_damage(checkpoint)
    save_checkpoint(args, settings, 3)
    assert find_damage(checkpoint) is None
    assert names(args.output_dir) == ["checkpoint-3"]


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(args, settings):
    """A run went on from 20, because 100 was damaged: its checkpoint of step 30 is not deleted as the older of two."""
    args = replace(args, save_total_limit=1)
    save_checkpoint(args, settings, 20)
    (save_checkpoint(replace(args, save_total_limit=2), settings, 100) / "model.safetensors").unlink()
    save_checkpoint(args, settings, 30)
    assert names(args.output_dir) == ["checkpoint-100", "checkpoint-30"]
    save_checkpoint(args, settings, 100)
    assert names(args.output_dir) == ["checkpoint-100"]


def test_what_a_kill_left_of_a_deleted_checkpoint_goes_when_the_run_goes_on(args, settings):
    checkpoint = save_checkpoint(args, settings, 20)
    output_dir = Path(args.output_dir)
    (output_dir / ".deleting").mkdir()
    (output_dir / ".deleting" / "model.safetensors").write_bytes(b"half")
    set_former_run_aside(output_dir, checkpoint)
    assert sorted(os.listdir(output_dir)) == [".writing", "checkpoint-20"]


def test_the_newest_checkpoints_are_kept(args, settings):
    args = replace(args, save_total_limit=2)
    for step in (8, 9, 10, 11):
        save_checkpoint(args, settings, step)
        newest = [f"checkpoint-{kept}" for kept in (step, step - 1) if kept >= 8]
        assert names(args.output_dir) == newest
    assert sorted(os.listdir(args.output_dir)) == [".writing", "checkpoint-10", "checkpoint-11"]


def test_half_a_deletion_leaves_no_checkpoint(args, settings, monkeypatch):
    older = save_checkpoint(args, settings, 1)
    newer = save_checkpoint(args, settings, 2)
    rmtree = shutil.rmtree

    def die_halfway(folder: Path, ignore_errors: bool = False) -> None:
        if Path(folder).exists():
            (Path(folder) / "model.safetensors").unlink()
            raise InterruptedError

    monkeypatch.setattr(shutil, "rmtree", die_halfway)
    with pytest.raises(InterruptedError):
        delete_checkpoint(older)
    assert names(args.output_dir) == ["checkpoint-2"]
    assert find_checkpoint("True", args.output_dir, settings) == newer
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    delete_checkpoint(newer)  # does not stumble over the rest
    assert names(args.output_dir) == []
    assert os.listdir(args.output_dir) == [".writing"]


# --- Finding -----------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_chosen_by_number(args, settings, capsys):
    for step in (20, 100, 3):
        save_checkpoint(args, settings, step)
    output_dir = Path(args.output_dir)
    for name in ("checkpoint-final", "checkpoint-200.tmp", "checkpoint-", "old-checkpoint-300"):
        (output_dir / name).mkdir()
    assert names(args.output_dir) == ["checkpoint-100", "checkpoint-20", "checkpoint-3"]
    assert find_checkpoint("True", args.output_dir, settings) == output_dir / "checkpoint-100"
    assert capsys.readouterr().out == f"resuming from {output_dir}/checkpoint-100\n"


def test_an_unfinished_checkpoint_is_never_taken(args, settings):
    older = save_checkpoint(args, settings, 20)
    unfinished = interrupt_checkpoint(args, 100)
    assert find_checkpoint("True", args.output_dir, settings) == older
    with pytest.raises(
        ValueError, match="no settings.json, so it is not a checkpoint of this toolkit.*name a complete"
    ):
        find_checkpoint(str(unfinished), args.output_dir, settings)


def test_a_folder_that_is_no_checkpoint_is_named_and_passed_over(args, settings, capsys):
    older = save_checkpoint(args, settings, 20)
    foreign = Path(args.output_dir) / "checkpoint-100"
    foreign.mkdir()
    write_files(foreign, 100)
    assert find_checkpoint("True", args.output_dir, settings) == older
    assert f"ignoring {foreign}: it has no settings.json" in capsys.readouterr().out


def test_without_a_checkpoint_training_starts_from_the_beginning(args, settings, capsys):
    assert find_checkpoint("True", args.output_dir, settings) is None
    assert "starting from the beginning" in capsys.readouterr().out
    save_checkpoint(args, settings, 20)
    assert find_checkpoint("False", args.output_dir, settings) is None


def test_an_older_checkpoint_beside_a_newer_one_is_refused(args, settings):
    older = save_checkpoint(args, settings, 20)
    newer = save_checkpoint(args, settings, 30)
    with pytest.raises(ValueError, match=f"the run would mix with {newer}; choose another --output_dir"):
        find_checkpoint(str(older), args.output_dir, settings)
    assert find_checkpoint(str(newer), args.output_dir, settings) == newer
    assert find_checkpoint(str(older), f"{args.output_dir}-2", settings) == older


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def overwrite(path: Path) -> None:
    """Of the same size, as a file system may leave a file whose bytes never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [(damage, file) for damage in (remove, empty, truncate, append, replace_by_a_folder) for file in FILES]
DAMAGES += [(overwrite, file) for file in FILES[:3]]  # those that can be opened


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_a_damaged_file_is_found_and_the_checkpoint_before_it_is_used(args, settings, capsys, damage, file):
    older = save_checkpoint(args, settings, 20)
    newer = save_checkpoint(args, settings, 100)
    damage(newer / file)
    assert find_damage(newer) == f"missing or damaged: {file}"
    assert find_checkpoint("True", args.output_dir, settings) == older
    output = capsys.readouterr().out
    assert output == f"ignoring {newer}: missing or damaged: {file}\nresuming from {older}\n"
    with pytest.raises(ValueError, match=f"missing or damaged: {file}; name a complete checkpoint"):
        find_checkpoint(str(newer), args.output_dir, settings)


def test_a_safetensors_header_that_does_not_fit_the_file_is_damage(args, settings):
    checkpoint = save_checkpoint(args, settings, 20)
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[40,8]", b"[40,9]"))
    assert find_damage(checkpoint) == "missing or damaged: model.safetensors"


@pytest.mark.parametrize("content", [b"", b'{"settings": {}, "fi', b"[]", b"{}", b"\xff\xfe", b'{"settings": {}}'])
def test_damaged_settings_are_damage_and_not_a_crash(args, settings, content):
    older = save_checkpoint(args, settings, 20)
    newer = save_checkpoint(args, settings, 100)
    (newer / "settings.json").write_bytes(content)
    assert find_damage(newer) == "its settings.json is damaged"
    assert find_checkpoint("True", args.output_dir, settings) == older


def test_no_flipped_bit_of_the_settings_is_a_crash(args, settings, capsys):
    """It is damage, or other settings, or nothing that matters."""
    older = save_checkpoint(args, settings, 20)
    newer = save_checkpoint(args, settings, 100)
    path = newer / "settings.json"
    content = path.read_bytes()
    num_older = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            num_older += find_checkpoint("True", args.output_dir, settings) == older
        except ValueError as problem:
            assert "belongs to a run with" in str(problem)
    assert num_older > len(content) // 4


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seed", 43), ("learning_rate", 1e-3), ("model_path", "models/other"), ("lr_scheduler_type", "linear"),
        ("warmup_steps", 5), ("weight_decay", 0.1), ("max_grad_norm", 0.5),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(args, rows, settings, flag, value):
    checkpoint = save_checkpoint(args, settings, 20)
    other = resume_settings(replace(args, **{flag: value}), rows)
    for choice in ("True", str(checkpoint)):
        with pytest.raises(ValueError, match=f"checkpoint-20 belongs to a run with .*'{flag}'.*; resume with the same"):
            find_checkpoint(choice, args.output_dir, other)
        assert find_checkpoint(choice, args.output_dir, settings) == checkpoint


@pytest.mark.parametrize("change", ["rows per step", "number of rows", "rows", "passage length"])
def test_a_checkpoint_of_other_rows_is_refused(args, rows, settings, change, tmp_path):
    args.random_passage = change == "passage length"
    checkpoint = save_checkpoint(args, resume_settings(args, rows), 20)
    rows_per_step = 8
    dataset = rows.dataset
    if change == "rows per step":
        rows_per_step = 4
    elif change == "number of rows":
        dataset = TokenizedDataset(save_rows(random_rows(23), tmp_path / "other"))
    elif change == "rows":
        dataset = TokenizedDataset(save_rows(random_rows(22, seed=1), tmp_path / "other"))
    else:
        args.passage_length += 1
    other = TrainingRows(dataset, rows_per_step, num_train_epochs=1, max_steps=-1, seed=42)
    for choice in ("True", str(checkpoint)):
        with pytest.raises(ValueError, match="checkpoint-20 belongs to a run with"):
            find_checkpoint(choice, args.output_dir, resume_settings(args, other))


def test_a_longer_run_that_saves_and_logs_more_often_goes_on(args, rows, settings):
    checkpoint = save_checkpoint(args, settings, 20)
    longer = TrainingRows(rows.dataset, rows_per_step=8, num_train_epochs=5, max_steps=-1, seed=42)
    changed = replace(args, num_train_epochs=5, save_steps=7, logging_steps=3, eval_steps=2, save_total_limit=1)
    assert find_checkpoint("True", args.output_dir, resume_settings(changed, longer)) == checkpoint


# --- Checkpoints of the former layout ----------------------------------------------------------------------------


def save_former_checkpoint(args: Arguments, settings: dict, step: int) -> Path:
    """complete.json was its last file: the run's settings, and the size and hash of every file."""
    checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    write_files(checkpoint, step)
    files = {}
    for path in checkpoint.rglob("*"):
        if path.is_file():
            files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": "0" * 64}
    (checkpoint / "complete.json").write_text(json.dumps({"identity": settings, "files": files}))
    return checkpoint


def test_a_checkpoint_of_the_former_layout_is_resumed_from(args, settings):
    save_checkpoint(args, settings, 20)
    former = save_former_checkpoint(args, settings, 30)
    assert find_damage(former) is None
    assert find_checkpoint("True", args.output_dir, settings) == former
    newer = save_checkpoint(args, settings, 40)
    assert find_checkpoint("True", args.output_dir, settings) == newer


def test_a_checkpoint_of_the_former_layout_without_its_mark_is_never_taken(args, settings, capsys):
    older = save_former_checkpoint(args, settings, 20)
    unfinished = save_former_checkpoint(args, settings, 30)
    (unfinished / "complete.json").unlink()
    assert find_checkpoint("True", args.output_dir, settings) == older
    assert f"ignoring {unfinished}: it has no settings.json" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_of_the_former_layout_is_passed_over(args, settings, file):
    older = save_former_checkpoint(args, settings, 20)
    damaged = save_former_checkpoint(args, settings, 30)
    truncate(damaged / file)
    assert find_damage(damaged) == f"missing or damaged: {file}"
    assert find_checkpoint("True", args.output_dir, settings) == older


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": [], "identity": {}}', '{"files": {"a": 1}, "iden'])
def test_a_damaged_mark_of_the_former_layout_is_damage_and_not_a_crash(args, settings, content):
    older = save_former_checkpoint(args, settings, 20)
    damaged = save_former_checkpoint(args, settings, 30)
    (damaged / "complete.json").write_text(content)
    assert find_damage(damaged) == "its settings.json is damaged"
    assert find_checkpoint("True", args.output_dir, settings) == older


def test_other_settings_than_those_of_the_former_layout_are_refused(args, settings):
    save_former_checkpoint(args, settings, 20)
    with pytest.raises(ValueError, match="belongs to a run with {'seed': 42}"):
        find_checkpoint("True", args.output_dir, settings | {"seed": 43})


# --- The run folder ----------------------------------------------------------------------------------------------


def test_a_former_run_is_set_aside_whole(args, settings, tmp_path, capsys):
    output_dir = Path(args.output_dir)
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine")
    set_former_run_aside(output_dir, None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # it holds no run
    save_checkpoint(args, settings, 20)
    set_former_run_aside(output_dir, None)
    assert list(output_dir.iterdir()) == []
    (former,) = [path for path in tmp_path.iterdir() if path != output_dir]
    assert former.name.startswith("run.2")
    assert find_damage(former / "checkpoint-20") is None
    assert (former / "notes.txt").read_text() == "mine"
    assert capsys.readouterr().out == f"{output_dir} held a former run, which is now {former}\n"


def test_a_finished_run_without_checkpoints_is_set_aside(args, tmp_path):
    output_dir = Path(args.output_dir)
    output_dir.mkdir()
    (output_dir / "run.json").write_text("{}")
    set_former_run_aside(output_dir, None)
    (former,) = [path for path in tmp_path.iterdir() if path != output_dir]
    assert former.name.startswith("run.2") and (former / "run.json").is_file()
    assert list(output_dir.iterdir()) == []


def test_a_run_that_is_resumed_stays_and_has_no_receipt_until_it_has_finished(args, settings):
    checkpoint = save_checkpoint(args, settings, 20)
    receipt = Path(args.output_dir) / "run.json"
    receipt.write_text("{}")
    set_former_run_aside(Path(args.output_dir), checkpoint)
    assert find_damage(checkpoint) is None
    assert not receipt.exists()
    set_former_run_aside(Path(args.output_dir), checkpoint)  # nor does it need one


def test_the_receipt_names_arguments_versions_data_and_row_order(args, rows, settings, capsys):
    Path(args.output_dir).mkdir()
    write_receipt(args, rows, [torch.device("cpu")], num_tokens=700, seconds=100.0)
    receipt = json.loads((Path(args.output_dir) / "run.json").read_text())
    assert receipt["command"] == sys.argv
    assert receipt["arguments"]["learning_rate"] == args.learning_rate
    assert receipt["arguments"]["output_dir"] == args.output_dir
    assert receipt["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert receipt["dataset"] == rows.dataset.ledger
    assert receipt["identity"] == {
        "script": "finetune_pp.py",
        "dataset_sha256": rows.dataset.ledger["sha256"],
        "num_rows": 22,
        "rows_per_step": 8,
        "model_path": "models/SmolLM2-135M-Instruct",
        "seed": 42,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    assert receipt["world_size"] == len(receipt["peak_memory_bytes"]) == 1
    assert receipt["peak_memory_bytes"][0] > 100 * 2**20  # torch alone takes more
    assert receipt["devices"] == ["cpu"]
    assert receipt["wall_time_seconds"] == 100.0 and receipt["tokens_per_second"] == 7.0
    assert [path.name for path in Path(args.output_dir).iterdir()] == ["run.json"]
    assert capsys.readouterr().out == f"saved {args.output_dir}\n"


def test_the_receipt_is_written_where_git_is_missing(args, rows, monkeypatch):
    Path(args.output_dir).mkdir()
    monkeypatch.setattr(finetune_pp.shutil, "which", lambda name: None)
    write_receipt(args, rows, [torch.device("cpu")], num_tokens=700, seconds=100.0)
    assert json.loads((Path(args.output_dir) / "run.json").read_text())["git_commit"] is None
