"""What holds for the scripts as texts: standalone, the same flags, plain, and the pieces they repeat kept equal."""

import ast
import dataclasses
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT

PLAIN = ["finetune_pp.py", "finetune_pp_peft.py"]
TRAINERS = ["finetune_pp_peft_trainer.py", "finetune_pp_peft_trainer_lora.py", "finetune_pp_peft_trainer_deepspeed.py"]
PIPELINE = "finetune_pp_1f1b.py"
PREFERENCES, PREFERENCES_TRAINER = "finetune_pp_dpo.py", "finetune_pp_dpo_trainer.py"
TRAINING = [*PLAIN, *TRAINERS, PIPELINE, PREFERENCES, PREFERENCES_TRAINER]
SCRIPTS = [*TRAINING, "test_sample.py"]
# The one table of defaults for every training script; None where the scripts differ on purpose.
DEFAULTS = {
    "model_path": "models/SmolLM2-135M-Instruct",
    "dataset_path": "data_sample/tokenized/triage_train",
    "eval_dataset_path": None,
    "random_passage": False,
    "passage_length": 512,
    "eval_steps": 100,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 1,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": "{}",
    "warmup_steps": 0.03,
    "weight_decay": 0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "seed": 42,
    "bf16": "auto",
    "padding_free": True,
    "gradient_checkpointing": False,
    "attn_implementation": "auto",
    "torch_compile": False,
    "resume_from_checkpoint": "False",
    "use_cpu": False,
    "report_to": "tensorboard",
}
PLAIN_DEFAULTS = {"num_gpus": 0}
PEFT_DEFAULTS = {
    "peft_mode": "lora",
    "peft_path": None,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": "all-linear",
    "num_virtual_tokens": 32,
    "mapping_hidden_dim": 1024,
}


@pytest.mark.parametrize("name", [*TRAINING, "data_collator.py"])
def test_a_training_script_imports_nothing_of_the_project_but_the_collator(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    own = {path.stem for path in ROOT.glob("*.py")} | {"tools", "tests", "data_sample"}
    assert imported & own <= {"data_collator"}


def test_importing_a_script_does_nothing(tmp_path):
    """In one process, because most of the time goes into importing what they share."""
    names = ", ".join(name[:-3] for name in SCRIPTS)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == 0 and completed.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_training_scripts_have_one_table_of_flags_and_defaults():
    deepspeed = {"deepspeed": "ds_configs/zero3.json", "lora_used": False}
    pipeline = {name: value for name, value in PEFT_DEFAULTS.items() if name.startswith("lora_")}
    pipeline |= {"pipeline_schedule": "1f1b", "lora_used": False}
    preferences = {name: value for name, value in PEFT_DEFAULTS.items() if name.startswith("lora_")}
    preferences |= {"lora_used": True, "lora_dropout": 0, "peft_path": None, "loss_type": "sigmoid", "beta": 0.1}
    preferences |= {"label_smoothing": 0, "simpo_gamma": 0.5, "desirable_weight": 1, "undesirable_weight": 1}
    preferences |= {"precompute_reference": False, "dataset_path": "data_sample/tokenized/preference_train"}
    for name, extra, rate in (
        ("finetune_pp", PLAIN_DEFAULTS, 2e-5),
        ("finetune_pp_peft", PLAIN_DEFAULTS | PEFT_DEFAULTS, 1e-3),
        ("finetune_pp_peft_trainer", {}, 2e-5),
        ("finetune_pp_peft_trainer_lora", PEFT_DEFAULTS | {"load_in_4bit": False}, 1e-3),
        ("finetune_pp_peft_trainer_deepspeed", PEFT_DEFAULTS | deepspeed, None),  # 1e-3 or 2e-5, by lora_used
        ("finetune_pp_1f1b", pipeline, None),
        ("finetune_pp_dpo", PLAIN_DEFAULTS | preferences, None),  # 5e-5 or 1e-6
        ("finetune_pp_dpo_trainer", preferences | {"deepspeed": None}, None),
    ):
        fields = {field.name: field.default for field in dataclasses.fields(importlib.import_module(name).Arguments)}
        defaults = DEFAULTS | extra | {"learning_rate": rate, "output_dir": f"outputs/{name}"}
        if "dpo" in name:  # a pair is never a passage of a document
            del defaults["random_passage"], defaults["passage_length"]
        assert fields == defaults


@pytest.mark.parametrize("name", TRAINING)
def test_help_has_each_flag_once_with_its_default_in_groups_on_two_screens(name):
    script = importlib.import_module(name.removesuffix(".py"))
    text = script.Parser(script.Arguments).format_help()
    lines = text.splitlines()
    assert len(lines) <= 2 * 40 and max(map(len, lines)) <= 120
    shown = {}
    for line in lines:
        if line.startswith("  --"):
            flag, default = line.split(maxsplit=2)[:2]
            assert flag not in shown
            shown[flag.removeprefix("--")] = default
    fields = {field.name: field for field in dataclasses.fields(script.Arguments)}
    assert list(shown) == list(fields)
    assert shown["lr_scheduler_type"] == "cosine" and shown["per_device_train_batch_size"] == "8"
    assert shown["output_dir"] == f"outputs/{script.__name__}" and shown["eval_dataset_path"] == "none"
    headings = [line for line in lines if line and not line.startswith((" ", "usage"))]
    assert len(set(headings)) == len(headings) >= 5
    assert "flash_attention_3" in text and "(auto, True, False)" in text


def test_flags_have_the_names_that_transformers_gives_them():
    """Of all flags, only those without a counterpart in TrainingArguments have names of our own."""
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {"model_path", "dataset_path", "eval_dataset_path", "padding_free", "attn_implementation"}
    own |= {"random_passage", "passage_length"}
    assert DEFAULTS.keys() - theirs == own


CANNOT = [
    ("flash_attention_2", 0, {}),
    ("flash_attention_3", 0, {}),
    ("flash_attention_2", 1, {"use_cpu": True}),
    ("flash_attention_2", 1, {"bf16": "False"}),
    ("flash_attention_2", 1, {"padding_free": False}),
    ("flex_attention", 0, {}),
    ("flex_attention", 2, {}),
]


@pytest.mark.parametrize("name", TRAINING)
def test_attention_that_the_machine_cannot_compute_is_refused_with_what_it_needs(name, tiny_model, monkeypatch):
    script = importlib.import_module(name[:-3])
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for kernel, num_gpus, flags in CANNOT:
        monkeypatch.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        with pytest.raises(ValueError, match="needs a GPU"):
            script.check_attention(kernel, config, script.Arguments(attn_implementation=kernel, **flags))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # Only the package is missing now, and transformers says so itself.
    with pytest.raises(ImportError, match="FlashAttention2"):
        script.check_attention("flash_attention_2", config, script.Arguments(attn_implementation="flash_attention_2"))
    for kernel in ("auto", "sdpa", "eager", "flex_attention"):
        script.check_attention(kernel, config, script.Arguments(attn_implementation=kernel))


@pytest.mark.parametrize("name", TRAINING)
def test_gpus_that_pytorch_cannot_use_are_a_mistake_and_not_a_crash(name, monkeypatch, tmp_path):
    """An older driver: NVML counts the GPUs, and CUDA does not start."""
    script = importlib.import_module(name[:-3])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = script.Arguments(output_dir=str(tmp_path))
    assert script.check_machine(args) == [
        "--use_cpu False: PyTorch cannot use the GPUs that are there; python tools/doctor.py says why"
    ]
    args.use_cpu = True
    assert script.check_machine(args) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args.use_cpu = False
    assert script.check_machine(args) == []


@pytest.mark.parametrize("name", [*TRAINING, "test_sample.py", "tools/evaluate.py"])
def test_cudnns_attention_is_off_wherever_a_model_is_loaded(name):
    """Padded rows and generated tokens have another length each time, too: it would plan for half a second each."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    load_model = next(node for node in tree.body if getattr(node, "name", "") in ("load_model", "load_stage"))
    calls = [ast.unparse(node) for node in ast.walk(load_model) if isinstance(node, ast.Call)]
    assert "torch.backends.cuda.enable_cudnn_sdp(False)" in calls


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_does_not_write_where_it_reads(name, tmp_path, monkeypatch):
    """It would move away the model that it is to load, or be resumed with what it has written itself."""
    script = importlib.import_module(name[:-3])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    own = {field.name for field in dataclasses.fields(script.Arguments)}
    for flag in {"model_path", "peft_path", "dataset_path", "eval_dataset_path"} & own:
        for value in ("a", "./a/", str(tmp_path / "a"), "link"):
            (mistake,) = script.check_folders(script.Arguments(output_dir="a", **{flag: value}))
            assert mistake.startswith(f"--output_dir a: --{flag} {value} lies in it")
        assert script.check_folders(script.Arguments(output_dir="a", **{flag: "b"})) == []
        # Inside, it is moved away along with a former run, and only then.
        within = script.Arguments(output_dir="a", **{flag: "a/checkpoint-2"})
        assert script.check_folders(within) == []
        (tmp_path / "a" / "checkpoint-2").mkdir(parents=True)
        assert len(script.check_folders(within)) == 1
        within.resume_from_checkpoint = "True"
        assert script.check_folders(within) == []
        shutil.rmtree(tmp_path / "a")
    assert len(script.check_folders(script.Arguments(output_dir="a", dataset_path="b:0.5,a:2"))) == 1
    assert script.check_folders(script.Arguments(output_dir="a", resume_from_checkpoint="a/checkpoint-2")) == []


def test_the_lock_of_a_killed_compilation_is_a_mistake_and_not_an_endless_wait(tmp_path, monkeypatch):
    script = importlib.import_module("finetune_pp_peft_trainer_deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert script.check_locks() == []
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()  # a compilation that is going on
    assert script.check_locks() == []
    os.utime(lock, (0, time.time() - 3600))
    (mistake,) = script.check_locks()
    assert str(lock) in mistake and "delete it" in mistake


@pytest.mark.parametrize("name", [*PLAIN, *TRAINERS, PREFERENCES, PREFERENCES_TRAINER])
def test_the_attention_that_was_asked_for_reaches_the_model(name, tiny_model):
    script = importlib.import_module(name[:-3])
    args = script.Arguments(model_path=str(tiny_model), attn_implementation="eager", use_cpu=True, bf16="False")
    here = {"config": transformers.AutoConfig.from_pretrained(tiny_model), "devices": [torch.device("cpu")]}
    here |= {"args": args, "checkpoint": None}
    model = script.load_model(**{name: here[name] for name in inspect.signature(script.load_model).parameters})
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", [*SCRIPTS, "tools/evaluate.py", "data_sample/tokenize_dataset.py"])
def test_every_flag_has_help_and_every_script_shows_its_command(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    assert f"python {name}" in ast.get_docstring(tree)
    arguments = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments")
    for field in arguments.body:
        call = ast.unparse(field.value)
        assert "'help': " in call or (call.startswith("flag(") and len(field.value.args) in (2, 3)), field.target.id


# What a strategy is made of; every other function or method that two training scripts have is the same in both.
DIFFERENT = {
    "check_arguments",
    "choose_loss",
    "load_model",
    "loss_in_chunks",
    "make_training_arguments",
    "evaluate",
    "train",
    "save_model",
    "save_checkpoint",
    "choose_devices",
    "load_checkpoint",
    "check_quantization",
    "check_saved",
    "check_adapter",
    "add_adapter",
    "write_receipt",
    "resume_settings",
    "stop",
    "stop_if_disk_is_full",
    "main",
    "Trainer.__init__",
    "Trainer.is_sharded",
    "Trainer.save_model",
    # Only in the two that learn from preferences are these not what they are in all others:
    "make_micro_batches",
    "read_ahead",
    "Trainer._save_optimizer_and_scheduler",
    "Trainer.compute_loss",
    "Trainer.evaluate",
    "Trainer.log",
    "Trainer.summed_loss",
    "RunCallback.on_train_begin",
}
# What the two share that learn from preferences: the losses, what is logged, and the reference's file.
OF_PREFERENCES = {
    "check_loss", "check_pairing", "check_reference", "add_adapter", "add_reference_adapter",
    "is_precomputed", "hash_weights", "find_reference", "save_reference", "sigmoid_loss", "ipo_loss", "hinge_loss",
    "simpo_loss", "orpo_loss", "kto_loss", "compare", "average",
}  # fmt: skip


def test_pieces_that_scripts_repeat_are_equal():
    versions = {}
    for script in TRAINING:
        tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                versions.setdefault(node.name, {})[script] = ast.dump(node)
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Trainer", "RunCallback")):
                kind = "RunCallback" if node.name == "RunCallback" else "Trainer"
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        text = ast.dump(method).replace(node.name, kind).replace("ZeROTrainer", "Trainer")
                        text = text.replace("FSDPTrainer", "Trainer").replace("PreferenceTrainer", "Trainer")
                        versions.setdefault(f"{kind}.{method.name}", {})[script] = text
    repeated = {name: scripts for name, scripts in versions.items() if len(scripts) > 1}
    unequal = {name for name, scripts in repeated.items() if len(set(scripts.values())) > 1}
    assert unequal == DIFFERENT  # and none of them is equal: else the list would hide a piece that must stay so
    in_all = {name for name, scripts in repeated.items() if len(scripts) == len(TRAINING)}
    assert {"publish_checkpoint", "delete_checkpoint", "find_checkpoint", "find_damage", "check_numbers"} <= in_all
    assert versions["make_optimizer"].keys() == {*PLAIN, PIPELINE, PREFERENCES}
    assert versions["RunCallback.on_step_end"].keys() == {*TRAINERS, PREFERENCES_TRAINER}
    assert len({versions["Trainer.compute_loss"][script] for script in TRAINERS}) == 1
    assert len({versions["Trainer.log"][script] for script in TRAINERS}) == 1
    for name in OF_PREFERENCES:
        assert versions[name][PREFERENCES] == versions[name][PREFERENCES_TRAINER], name


def test_the_two_loops_differ_by_one_call():
    """The strategy is in load_model and save_model; the loop is the same but for what a checkpoint loads."""
    loops = []
    for name in PLAIN:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        loop = next(node for node in tree.body if getattr(node, "name", "") == "train")
        loops.append(ast.unparse(loop).splitlines())
    assert len(loops[0]) == len(loops[1])
    assert sum(a != b for a, b in zip(*loops, strict=True)) == 1


# Private names of libraries that the scripts use, where each is defined: an upgrade that drops one fails here.
PRIVATE = {
    "_save_optimizer_and_scheduler": transformers.Trainer,
    "_load_from_checkpoint": transformers.Trainer,
    "_no_split_modules": transformers.PreTrainedModel,
    "_supports_attention_backend": transformers.PreTrainedModel,
    "_keys_to_ignore_on_load_unexpected": transformers.PreTrainedModel,
    "_attn_implementation": transformers.PreTrainedConfig,
    "_is_avx512_bf16_supported": torch.cpu,
    "_is_amx_tile_supported": torch.cpu,
}


def test_private_names_of_libraries_are_these_and_still_there():
    found = set()
    for script in [*TRAINING, "data_collator.py"]:
        own = set()
        for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name.startswith("_"):
                if script == "data_collator.py":
                    own.add(node.name)
                elif not node.name.startswith("__"):
                    found.add(node.name)  # it overrides a library's
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                found.add(node.attr)
        found -= own
    assert found - {"_exit"} == PRIVATE.keys()  # os._exit is documented
    for name, owner in PRIVATE.items():
        assert hasattr(owner, name), name


def test_a_script_does_not_read_or_replace_the_code_of_a_library():
    for script in [*TRAINING, "data_collator.py"]:
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in ("getsource", "_shared_state", ".forward =", "setattr(", "ctypes"):
            assert word not in source, f"{word} in {script}"
