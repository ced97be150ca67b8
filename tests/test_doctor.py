"""tools/doctor.py: what must stop a run stops it, what is right passes, and nothing of a rehearsal stays behind."""

import copy
import json
import os
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from preference_rows import random_pairs, save_preferences
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(ROOT / "tools"))
import doctor  # noqa: E402
import watch_weights  # noqa: E402


def levels(checks) -> list[str]:
    return [level for level, _, _ in checks]


GOOD = {
    "gradients": [{"lora_A": 0.0, "lora_B": 0.3}, {"lora_A": 0.1, "lora_B": 0.2}],
    "before": {"weight": 1.0, "lora_A": 2.0, "lora_B": 0.0},
    "after": {"weight": 1.0, "lora_A": 2.5, "lora_B": 0.5},
    "frozen": ["weight"],
}


def test_gradients_where_they_must_be_and_moves_only_there():
    assert levels(doctor.check_weights([GOOD])) == ["ok"] * 4
    for step, name in ((0, "lora_B"), (1, "lora_A"), (1, "lora_B")):
        broken = copy.deepcopy(GOOD)
        broken["gradients"][step][name] = 0.0
        assert levels(doctor.check_weights([broken])).count("FAIL") == 1
        # With sharding it is enough that one process has a gradient in its shard.
        assert levels(doctor.check_weights([broken, GOOD])) == ["ok"] * 4
    still = GOOD | {"after": GOOD["after"] | {"lora_A": 2.0}}
    assert levels(doctor.check_weights([still])) == ["ok", "ok", "FAIL", "ok"]
    strayed = GOOD | {"after": GOOD["after"] | {"weight": 1.5}}
    assert levels(doctor.check_weights([strayed])) == ["ok", "ok", "ok", "FAIL"]
    nothing = {"gradients": [{}, {}], "before": {"weight": 1.0}, "after": {"weight": 1.0}, "frozen": ["weight"]}
    assert "FAIL" in levels(doctor.check_weights([nothing]))


class Decoder(torch.nn.Module):
    """An embedding that is frozen, a layer that is trained, and one that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4).requires_grad_(False)
        self.layer = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, ids):
        return self.layer(self.embedding(ids))


def test_the_watch_sees_gradients_and_moves_by_name(tmp_path):
    """Two micro-batches a step; the head's weight is used without calling its layer, so it has no name."""
    decoder = Decoder()
    head = torch.nn.Linear(4, 10, bias=False)
    watch = watch_weights.Watch(str(tmp_path / "watched"))
    hooks = [
        register_module_forward_pre_hook(watch.before_forward),
        register_optimizer_step_pre_hook(watch.before_update),
    ]
    optimizer = torch.optim.AdamW([*decoder.layer.parameters(), *decoder.unused.parameters(), head.weight], lr=0.1)
    for _ in range(3):
        for ids in (torch.tensor([1, 2]), torch.tensor([3, 4])):
            with torch.no_grad():
                decoder(ids)  # an evaluation is not looked at
            (decoder(ids) @ head.weight.T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    found = json.loads((tmp_path / "watched.0").read_text())
    name = "tensor 1 without a name, [10, 4]"
    assert found["frozen"] == ["embedding.weight"]
    assert [sorted(step) for step in found["gradients"]] == [["layer.bias", "layer.weight", name]] * 2
    moved = [key for key in found["before"] if found["before"][key] != found["after"][key]]
    assert sorted(moved) == ["layer.bias", "layer.weight", name]


@dataclass
class Run:
    model_path: str
    dataset_path: str
    random_passage: bool = False
    passage_length: int = 512


def test_eos_must_be_learned_and_bos_stand_once(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")  # BOS is 1, EOS is 2
    good = [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}] * 3
    sets = {
        "good": (good, ["ok", "ok"]),
        "some end": ([*good, {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}], ["note", "ok"]),
        "none ends": ([{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, -100]}], ["FAIL", "ok"]),
        "two BOS": ([{"input_ids": [1, 1, 6, 2], "labels": [-100, -100, 6, 2]}], ["ok", "FAIL"]),
        "packed": ([{"input_ids": [1, 5, 2, 1, 1, 2], "labels": [-100, 5, 2, -100, -100, 2],
                     "position_ids": [0, 1, 2, 0, 1, 2]}], ["ok", "FAIL"]),
    }  # fmt: skip
    for name, (rows, expected) in sets.items():
        path = save_rows(rows, tmp_path / name)
        assert levels(doctor.check_data(Run(str(tmp_path / "model"), str(path)))) == expected, name


def test_a_first_loss_far_above_guessing_stops_the_run(tiny_model):
    run = Run(str(tiny_model), "")  # 300 tokens: guessing gives 5.70
    assert [levels(doctor.check_loss(run, [{"loss": loss}])) for loss in (2.0, 6.0, 12.0, float("nan"))] == [
        ["ok"], ["note"], ["FAIL"], ["FAIL"],
    ]  # fmt: skip


def test_the_machine_that_runs_these_tests_passes(tmp_path):
    checks = doctor.check_versions() + doctor.check_limits() + doctor.check_disk(tmp_path / "a" / "b")
    assert "FAIL" not in levels(checks) and len(checks) >= 6
    assert not any(tmp_path.iterdir())


def test_the_lock_of_a_compilation_that_was_killed_is_found(tmp_path, monkeypatch):
    """One that is being held is no fault; one that is left makes every later run with DeepSpeed wait for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.check_locks() == []
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert levels(doctor.check_locks()) == ["ok"]
    os.utime(lock, (0, time.time() - 3600))
    (left,) = doctor.check_locks()
    assert left.level == "FAIL" and str(lock) in left.found and "delete it" in left.remedy


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(version): a stand-in for nvidia-smi that lists two GPUs with it, or fails as without a driver."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def install(version: str | None) -> None:
        text = f"#!/bin/sh\nprintf '{version}\\n{version}\\n'\n"
        if version is None:
            text = "#!/bin/sh\necho NVIDIA-SMI has failed because it could not communicate with the driver\nexit 9\n"
        (tmp_path / "nvidia-smi").write_text(text)
        (tmp_path / "nvidia-smi").chmod(0o755)

    return install


@pytest.mark.parametrize(
    ("version", "cuda", "words"),
    [
        ("550.54.15", "13.0", ("driver 550.54.15 is too old for CUDA 13", "whl/cu126")),
        ("470.82.01", "13.0", ("driver 470.82.01 is too old for CUDA 12", "update it")),
        ("550.54.15", None, ("build without CUDA", "whl/cu126")),
        ("580.65.06", "13.0", ("CUDA_VISIBLE_DEVICES",)),
        (None, "13.0", ("nvidia-smi does not answer", "--gpus all")),
    ],
)
def test_gpus_that_cannot_be_used_are_named_with_driver_and_remedy(version, cuda, words, driver, tmp_path, monkeypatch):
    """As where PyTorch's CUDA is newer than the driver: the driver's list has two GPUs, and CUDA does not start."""
    driver(version)
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidia1").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for num_gpus in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        (only,) = doctor.check_gpus()
        assert only.level == "FAIL" and only.found.startswith(f"2 GPUs, driver {version or 'unknown'}, and PyTorch")
        for word in words:
            assert word in only.remedy


def test_a_measured_machine_is_what_the_plan_reads(tmp_path):
    """Written by the doctor, read by plan.py; a fraction of a second for each figure."""
    path = tmp_path / "machine.json"
    doctor.write_machine(str(path))
    machine = json.loads(path.read_text())
    assert 1e9 < machine["cpu"]["flops"] < 1e14 and 1e8 < machine["cpu"]["memory_bandwidth"] < 1e13
    assert machine["speeds"]["disk"] > 1e6
    planned = run_script("tools/plan.py", "--machine", path, "--gpus", 1, "--model", "smollm2-135m", "--batch", 8)
    assert "1. " in planned.stdout and "USE_CPU=1" in planned.stdout


def test_mistakes_end_with_one_message():
    for words, part in (
        (["--", "train.py"], "train.py: behind -- stands one of finetune_"),
        (["--cores", "3"], "usage: tools/doctor.py"),
        (["--json"], "usage: tools/doctor.py"),
        (["--json", "no/such/machine.json"], "--json no/such/machine.json: no such folder"),
        (["--num_processes", "0"], "--num_processes 0: must be a number above 0"),
        (["--num_processes", "2", "--", "finetune_pp.py"], "--num_processes 2: finetune_pp.py is one process"),
    ):
        with pytest.raises(SystemExit) as stopped:
            sys.argv = ["doctor.py", *words]
            doctor.main()
        assert part in str(stopped.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("finetune_pp.py", []),
        ("finetune_pp_peft.py", []),
        ("finetune_pp_peft.py", ["--peft_mode=ptuning"]),
        ("finetune_pp_1f1b.py", ["--num_processes", 2, "--gradient_accumulation_steps", 4]),
        ("finetune_pp_1f1b.py", ["--lora_used", True]),
        ("finetune_pp_peft_trainer.py", ["--num_processes", 2]),
        ("finetune_pp_peft_trainer_lora.py", ["--num_processes", 2]),
        ("finetune_pp_peft_trainer_deepspeed.py", ["--lora_used", True]),
        ("finetune_pp_peft_trainer_deepspeed.py", ["--deepspeed", "ds_configs/zero2.json", "--num_processes", 2]),
        ("finetune_pp_dpo.py", []),
        ("finetune_pp_dpo.py", ["--lora_used", False]),
        ("finetune_pp_dpo_trainer.py", ["--num_processes", 2]),
    ],
)
def test_a_good_run_is_rehearsed_and_leaves_nothing(script, flags, tmp_path):
    rows = [{"input_ids": row["input_ids"] + [2], "labels": row["labels"] + [2]} for row in random_rows(22)]
    model, data = save_tiny_model(tmp_path / "model"), save_rows(rows, tmp_path / "rows")
    if "dpo" in script:
        pairs = random_pairs(22)
        for row in pairs:
            for answer in ("chosen", "rejected"):
                row[f"{answer}_ids"].append(2)
                row[f"{answer}_labels"].append(2)
        data = save_preferences(pairs, tmp_path / "rows")
    own = [word for i, word in enumerate(flags) if "--num_processes" in (word, flags[i - 1] if i else "")]
    rest = [word for word in flags if word not in own]
    completed = run_script("tools/doctor.py", *own, "--", script, "--model_path", model, "--dataset_path", data,
                           "--output_dir", tmp_path / "out", "--use_cpu", True, *rest, check=False)  # fmt: skip
    assert completed.returncode == 0, completed.stdout
    assert "all is well" in completed.stdout and "trained tensors moved" in completed.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows"]


@pytest.mark.slow
def test_a_bad_run_is_stopped_with_the_reason(tiny_model, tmp_path):
    data = save_rows(random_rows(22), tmp_path / "rows")  # no row ends with EOS
    flags = ["--model_path", tiny_model, "--dataset_path", data, "--output_dir", tmp_path / "out", "--use_cpu", True]
    completed = run_script("tools/doctor.py", "--", "finetune_pp_peft.py", *flags, check=False)
    assert completed.returncode == 1
    assert "FAIL EOS is a target in 0 of 22" in completed.stdout and "do not start" in completed.stdout
    completed = run_script("tools/doctor.py", "--", "finetune_pp_peft.py", *flags, "--lora_rank", 0, check=False)
    assert completed.returncode == 1 and "--lora_rank 0: must be > 0" in completed.stdout
    pipeline = ["--num_processes", 2, "--", "finetune_pp_1f1b.py", *flags]
    completed = run_script("tools/doctor.py", *pipeline, check=False)
    assert completed.returncode == 1 and "ChildFailedError" not in completed.stdout
    assert "-> error: --gradient_accumulation_steps 1: 1f1b needs a micro-batch for each" in completed.stdout
    assert not (tmp_path / "out").exists()
