"""The shell launchers: each is started as a reader types it, with plain sh, and trains for real on CPU processes.

What needs no training (defaults, quoting, the rendezvous) is asked of a stand-in for Python that tells what it was
called with. Slurm is a stand-in, too: its srun starts two nodes side by side on this machine.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, WITHOUT_BITSANDBYTES, run_script
from preference_rows import random_pairs, save_preferences

PLAIN = ["finetune_pp", "finetune_pp_peft", "finetune_pp_dpo"]
TRAINERS = ["finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora", "finetune_pp_peft_trainer_deepspeed",
            "finetune_pp_peft_trainer_checkpointing", "finetune_pp_dpo_trainer"]  # fmt: skip
LAUNCHERS = [*PLAIN, *TRAINERS]
GUARD = '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"'
SH = shutil.which("dash") or "sh"  # what /bin/sh is on Debian and Ubuntu
FAST = ["--bf16", "False", "--report_to", "none"]


def text_of(name: str) -> str:
    return (ROOT / "scripts" / name).read_text(encoding="utf-8")


def command_of(launcher: str) -> list[str]:
    """The words of the command that a launcher becomes, as they stand in it."""
    return shlex.split(text_of(f"{launcher}.sh").replace("\\\n", " ").split("\nexec ")[1])


def clean_environment(**variables) -> dict[str, str]:
    """This environment without what launchers read from it."""
    read = {"NUM_GPUS", "NUM_NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MODEL", "DATASET", "OUTPUT_DIR",
            "USE_CPU", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
            "PYTORCH_ALLOC_CONF"}  # fmt: skip
    return {name: value for name, value in os.environ.items() if name not in read} | variables


# -------------------------------------------------------------------------------------------------------------------
# As texts
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(f"{launcher}.sh" for launcher in LAUNCHERS), "slurm.sbatch"])
def test_a_launcher_is_short_documented_and_safe(name):
    lines = text_of(name).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    guard = lines.index(GUARD)
    header = lines[1:guard]
    assert all(line.startswith("#") for line in header) and lines[guard + 1] == "set -euo pipefail"
    for promised in ("8 A100-80G", "Effective batch", "Memory", "ost"):
        assert promised in "\n".join(header)
    code = [line for line in lines if line.strip() and (not line.strip().startswith("#") or line.startswith("#SBATCH"))]
    assert len(code) <= 40
    assert lines[-1] == '  "$@"'  # last, so that any flag can be overridden
    assert max(map(len, lines)) <= 120
    assert (ROOT / "scripts" / name).stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / name]).returncode == 0


@pytest.mark.skipif(not shutil.which("dash"), reason="no dash")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_dash_reads_the_guard_line_and_hands_over(launcher, tmp_path):
    lines = text_of(f"{launcher}.sh").splitlines()
    (tmp_path / "guard.sh").write_text("\n".join(lines[: lines.index(GUARD) + 1]) + "\n")
    assert subprocess.run(["dash", "-n", "guard.sh"], cwd=tmp_path).returncode == 0
    (tmp_path / "guard.sh").write_text(GUARD + '\nset -o pipefail\nprintf "%s|" "$BASH_VERSION" "$@"\n')
    completed = subprocess.run(["dash", "guard.sh", "a b", "c"], cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"\d.*\|a b\|c\|", completed.stdout)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_flag_of_a_launcher_is_one_of_its_script(launcher):
    words = command_of(launcher)
    script = next(word for word in words if word.endswith(".py"))
    module = importlib.import_module(script[:-3])
    passed = words[words.index(script) + 1 : -1]
    if launcher in TRAINERS:
        assert script == launcher.replace("_checkpointing", "") + ".py"
    else:
        assert script == f"{launcher}.py"
    assert len(passed) % 2 == 0 and all(name.startswith("--") for name in passed[::2])
    assert len(set(passed[::2])) == len(passed) // 2
    assert re.findall(r"^  set -- (.*)$", text_of(f"{launcher}.sh"), re.MULTILINE) == ['--use_cpu True "$@"']
    parser = module.HfArgumentParser(module.Arguments, allow_abbrev=False)
    parser.parse_args_into_dataclasses([*passed, "--use_cpu", "True"])  # an unknown or abbreviated flag ends the test


def test_what_the_trainer_launchers_repeat_is_equal():
    pieces = []
    for launcher in TRAINERS:
        text = text_of(f"{launcher}.sh")
        piece = text[text.index("NUM_GPUS=${") : text.index(f"  {launcher.replace('_checkpointing', '')}.py")]
        differs = r"(DATASET=\$\{DATASET:-|OUTPUT_DIR=\$\{OUTPUT_DIR:-|^MODEL=\$\{MODEL:-)[^}]*"
        pieces.append(re.sub(differs, r"\1", piece, flags=re.MULTILINE))
    assert len(pieces[0].splitlines()) > 20 and len(set(pieces)) == 1


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "finetune_pp_1f1b"])
def test_the_predictions_of_a_header_are_those_of_its_command(launcher):
    """And the rows, accumulation steps and checkpointing of that command are the launcher's."""
    header = text_of(f"{launcher}.sh").split(GUARD)[0]
    predicted = re.search(
        r"^# Predicted by tools/plan.py, not measured: (\S+) GB a GPU \(nvidia-smi: (\S+)\), (\S+) s a step\.\n"
        r"#   python (tools/plan.py .*)$",
        header,
        re.MULTILINE,
    )
    question = predicted[4].split()
    (way,) = json.loads(run_script(*question, "--json", "True").stdout)["rows"]
    assert float(predicted[1]) == pytest.approx(way["total_bytes"] / 1e9, abs=0.51)
    assert float(predicted[2]) == pytest.approx(way["nvidia_smi_bytes"] / 1e9, abs=0.51)
    assert float(predicted[3]) == pytest.approx(way["step_seconds"], rel=0.05)
    assert way["fits"] and way["nvidia_smi_range"][1] < way["gpu_bytes"]
    flags = command_of(launcher)
    assert value_of(flags, "--per_device_train_batch_size") == str(way["rows_of_forward"])
    assert value_of(flags, "--gradient_accumulation_steps") == str(way["accumulation"])
    assert ("--gradient_checkpointing" in flags) == way["checkpointing"]
    assert f"{way['rows_of_forward']} rows" in header.split("Memory")[0]


# -------------------------------------------------------------------------------------------------------------------
# What a launcher calls: a stand-in for Python tells
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """told(launcher, *flags, **environment): arguments and environment of the Python that a launcher starts."""
    root = tmp_path_factory.mktemp("launchers") / "check out"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))\n"
    )  # fmt: skip
    (root / "bin" / "python").chmod(0o755)

    def tell(launcher: str, *flags: str, **environment) -> tuple[list[str], dict[str, str]]:
        path = f"{root / 'bin'}:{os.environ['PATH']}"
        completed = subprocess.run(
            [SH, f"{launcher}.sh", *flags],
            cwd=root / "scripts",
            env=clean_environment(PATH=path, **environment),
            capture_output=True,
            text=True,
        )
        assert completed.returncode == 0, completed.stderr
        arguments, seen, folder = json.loads(completed.stdout)
        assert folder == str(root)
        assert "+ exec python " in completed.stderr  # the command is printed
        return arguments, seen

    return tell


def value_of(arguments: list[str], name: str) -> str:
    """A flag's value: the last one wins."""
    return arguments[len(arguments) - arguments[::-1].index(name)]


def test_the_defaults_are_those_of_the_design(told):
    folders = set()
    for launcher in LAUNCHERS:
        arguments, environment = told(launcher)
        assert value_of(arguments, "--model_path") == f"models/llama-{'33b' if 'deepspeed' in launcher else '7b'}"
        data = "preference_train" if "dpo" in launcher else "triage_train"
        assert value_of(arguments, "--dataset_path") == f"data_sample/tokenized/{data}"
        assert value_of(arguments, "--output_dir") == f"outputs/{launcher}"
        folders.add(value_of(arguments, "--output_dir"))
        assert "--use_cpu" not in arguments and "CUDA_VISIBLE_DEVICES" not in environment
        processes = int(value_of(arguments, "--nproc-per-node")) if launcher in TRAINERS else 1
        rows, accumulation = (int(value_of(arguments, f"--{name}")) for name in
                              ("per_device_train_batch_size", "gradient_accumulation_steps"))  # fmt: skip
        assert processes * rows * accumulation == 128
        header = re.search(r"(\d+) (?:GPUs|process) x (\d+) rows x (\d+) accumulation steps? = (\d+) rows",
                           text_of(f"{launcher}.sh"))  # fmt: skip
        assert list(map(int, header.groups())) == [processes, rows, accumulation, 128]
        if launcher in TRAINERS:
            assert processes == 8 and "--standalone" in arguments
            assert value_of(arguments, "--shutdown-timeout") == "600"
    assert len(folders) == len(LAUNCHERS)
    arguments, _ = told("finetune_pp_peft_trainer_deepspeed")
    assert value_of(arguments, "--deepspeed") == "ds_configs/zero3.json"
    assert value_of(arguments, "--lora_used") == "True"
    assert "--learning_rate" not in arguments  # it depends on --lora_used, and the script knows


def test_checkpointing_changes_the_cut_of_a_step_and_not_its_rows(told):
    (plain, _), (checkpointing, _) = (told(f"finetune_pp_peft_trainer{name}") for name in ("", "_checkpointing"))
    cut = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    (rows, steps), (more_rows, fewer_steps) = ([int(value_of(a, n)) for n in cut] for a in (plain, checkpointing))
    assert rows * steps == more_rows * fewer_steps and more_rows > rows
    assert value_of(checkpointing, "--gradient_checkpointing") == "True" and "--gradient_checkpointing" not in plain
    for name in ("--nproc-per-node", "--model_path", "--dataset_path", "--learning_rate"):
        assert value_of(plain, name) == value_of(checkpointing, name)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_environment_and_appended_flags_win(launcher, told):
    places = {"MODEL": "my models/llama", "DATASET": "/my sets/a", "OUTPUT_DIR": "/out put/b"}
    flags = ("--learning_rate", "1e-4", "--output_dir", "/else where")
    arguments, _ = told(launcher, *flags, NUM_GPUS="3", **places)
    assert arguments[-4:] == list(flags)
    assert value_of(arguments, "--model_path") == "my models/llama"
    assert value_of(arguments, "--dataset_path") == "/my sets/a"
    assert "/out put/b" in arguments and value_of(arguments, "--output_dir") == "/else where"
    if launcher in TRAINERS:
        assert value_of(arguments, "--nproc-per-node") == "3"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cpu_gets_the_sample_model(launcher, told):
    arguments, environment = told(launcher, USE_CPU="1", NUM_GPUS="2")
    assert value_of(arguments, "--model_path") == "models/SmolLM2-135M-Instruct"
    assert arguments[-2:] == ["--use_cpu", "True"]
    # Several processes would fight over the cores; a single one may have them all.
    assert environment.get("OMP_NUM_THREADS") == ("1" if launcher in TRAINERS else None)
    arguments, environment = told(launcher, USE_CPU="1", MODEL="other", OMP_NUM_THREADS="4")
    assert value_of(arguments, "--model_path") == "other" and environment["OMP_NUM_THREADS"] == "4"
    assert "--use_cpu" not in told(launcher, USE_CPU="0")[0]


@pytest.mark.parametrize("launcher", [*LAUNCHERS, "finetune_pp_1f1b"])
def test_gpu_memory_is_not_cut_into_segments_and_a_gpu_process_has_its_share_of_the_cores(launcher, told):
    _, environment = told(launcher, NUM_GPUS="1")
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    # For one process torch itself takes all cores; torchrun would give each of several a single one.
    if launcher not in PLAIN:
        assert environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    _, environment = told(launcher, NUM_GPUS="999", PYTORCH_ALLOC_CONF="backend:native")
    assert environment["PYTORCH_ALLOC_CONF"] == "backend:native"
    if launcher not in PLAIN:
        assert environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("launcher", PLAIN)
def test_num_gpus_limits_what_one_process_sees(launcher, told):
    def visible(**variables):
        return told(launcher, **variables)[1].get("CUDA_VISIBLE_DEVICES")

    assert visible() is None
    assert visible(NUM_GPUS="1") == "0"
    assert visible(NUM_GPUS="3") == "0,1,2"
    assert visible(NUM_GPUS="2", CUDA_VISIBLE_DEVICES="5,3,7") == "5,3"
    assert visible(NUM_GPUS="2", CUDA_VISIBLE_DEVICES="") == ""
    assert visible(CUDA_VISIBLE_DEVICES="5,3,7") == "5,3,7"


@pytest.mark.parametrize("launcher", TRAINERS)
def test_nodes_meet_at_the_first_one(launcher, told):
    there = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    for port, expected in ({}, "29500"), ({"MASTER_PORT": "1234"}, "1234"):
        arguments, _ = told(launcher, **there, **port)
        of_torchrun = arguments[: next(i for i, word in enumerate(arguments) if word.endswith(".py"))]
        assert of_torchrun == ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1", "--master-addr",
                               "10.0.0.1", "--master-port", expected, "--nproc-per-node", "8", "--shutdown-timeout",
                               "600"]  # fmt: skip
    arguments, _ = told(launcher, MASTER_PORT="1234")  # one node keeps the port that was asked for
    assert "--standalone" not in arguments and value_of(arguments, "--master-port") == "1234"
    assert value_of(told(launcher, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="7")[0], "--shutdown-timeout") == "7"


# -------------------------------------------------------------------------------------------------------------------
# The environment: which build of PyTorch is installed
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def install_torch(tmp_path):
    """install_torch(driver): what scripts/environment.sh has pip do where nvidia-smi shows this driver, or none."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\ntransformers==5.23.0\ndeepspeed==0.19.8\n")
    stub = '#!/bin/sh\necho "$DS_BUILD_OPS $DS_IGNORE_CUDA_DETECTION $@" >>calls\n[ ! -f offline ] || exit 1\n'
    for path, text in ((".venv/bin/python", stub), ("bin/nvidia-smi", "#!/bin/sh\ncat driver\n")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)

    def install(driver: str, function: str = "install_torch", is_offline: bool = False):
        (tmp_path / "driver").write_text(driver)
        (tmp_path / "calls").write_text("")
        if is_offline:
            (tmp_path / "offline").touch()
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail; source scripts/environment.sh; {function}"],
            cwd=tmp_path,
            env=clean_environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"),
            capture_output=True,
            text=True,
        )

    install.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    install.folder = tmp_path
    return install


@pytest.mark.parametrize(
    ("driver", "index"),
    [
        ("580.65.06\n580.65.06\n", None),  # PyPI's build
        ("595.10\n", None),
        ("570.124.06\n", "https://download.pytorch.org/whl/cu126"),
        ("525.60.13\n", "https://download.pytorch.org/whl/cu126"),
        ("470.82.01\n", "https://download.pytorch.org/whl/cpu"),
        ("NVIDIA-SMI has failed because it could not communicate\n", "https://download.pytorch.org/whl/cpu"),
    ],
)
def test_the_build_of_pytorch_fits_the_driver(driver, index, install_torch):
    completed = install_torch(driver)
    assert completed.returncode == 0, completed.stderr
    last_words = install_torch.calls()[-1].split()
    assert last_words[-1] == "torch==2.13.0"
    if index is None:
        assert "--index-url" not in last_words
    else:
        assert value_of(last_words, "--index-url") == index
    assert ("too old" in completed.stderr) == driver.startswith("470")


def test_an_old_driver_without_its_index_ends_with_the_remedy(install_torch):
    """The build that PyPI has would be installed, three gigabytes, and could not run."""
    completed = install_torch("550.54.15\n", is_offline=True)
    assert completed.returncode != 0 and len(install_torch.calls()) == 1
    assert "driver 550 needs PyTorch's build for CUDA 12.6" in completed.stderr and "update" in completed.stderr


def test_deepspeed_is_installed_without_nvcc(install_torch):
    """The stand-in for Python makes no .venv, so the one that is there stays."""
    completed = install_torch("580.65.06\n", function="find_python() { echo true; }; install")
    assert completed.returncode == 0, completed.stderr
    of_deepspeed = [call for call in install_torch.calls() if call.endswith("deepspeed==0.19.8")]
    assert len(of_deepspeed) == 1 and of_deepspeed[0].startswith("0 1 -m pip install --no-build-isolation")


# -------------------------------------------------------------------------------------------------------------------
# For real
# -------------------------------------------------------------------------------------------------------------------


def launch(*command, folder: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    variables = {"USE_CPU": "1", "NUM_GPUS": "2", "OMP_NUM_THREADS": "1"} | WITHOUT_BITSANDBYTES | environment
    completed = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=clean_environment(**{name: str(value) for name, value in variables.items()}),
        capture_output=True,
        text=True,
    )
    if completed.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{completed.stdout}\n{completed.stderr}")
    return completed


def receipt_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "trainer_state.json").read_text())["log_history"]]


@pytest.fixture
def places(tiny_model, tiny_set, tmp_path):
    """MODEL, DATASET and OUTPUT_DIR, with spaces where a user may have them."""
    (tmp_path / "my models").mkdir()
    (tmp_path / "my models" / "tiny").symlink_to(tiny_model)
    return {"MODEL": tmp_path / "my models" / "tiny", "DATASET": tiny_set, "OUTPUT_DIR": tmp_path / "out put" / "run"}


def check_receipt(launcher: str, places: dict, overridden: dict) -> dict:
    """The run was the launcher's own, but for what was appended."""
    receipt = receipt_of(places["OUTPUT_DIR"])
    assert receipt["world_size"] == (2 if launcher in TRAINERS else 1)
    assert {device.split(":")[0] for device in receipt["devices"]} == {"cpu"}
    assert receipt["arguments"]["use_cpu"] is True
    own = command_of(launcher)
    own = own[next(i for i, word in enumerate(own) if word.endswith(".py")) + 1 : -1]
    expected = {name[2:]: value for name, value in zip(own[::2], own[1::2], strict=True) if "$" not in value}
    expected |= {"model_path": places["MODEL"], "dataset_path": places["DATASET"], "output_dir": places["OUTPUT_DIR"]}
    expected |= overridden
    for name, value in expected.items():
        found = receipt["arguments"][name]
        assert float(found) == float(value) if type(found) in (int, float) else str(found) == str(value), name
    return receipt


@pytest.mark.parametrize(
    ("launcher", "saved"),
    [
        ("finetune_pp", "model.safetensors"),
        ("finetune_pp_peft", "adapter_model.safetensors"),
        ("finetune_pp_dpo", "adapter_model.safetensors"),
    ],
)
def test_a_plain_launcher_trains(launcher, saved, places, tmp_path):
    if launcher == "finetune_pp_dpo":
        places["DATASET"] = save_preferences(random_pairs(22), tmp_path / "pairs")
    completed = launch(SH, f"scripts/{launcher}.sh", *FAST, "--max_steps", 2, "--learning_rate", 3e-4, **places)
    receipt = check_receipt(launcher, places, {"learning_rate": 3e-4, "max_steps": 2})
    assert receipt["identity"]["rows_per_step"] == 128
    assert len(losses_of(places["OUTPUT_DIR"])) == 2 and (places["OUTPUT_DIR"] / saved).is_file()
    assert f"{launcher}.py --model_path '{places['MODEL']}'" in completed.stderr  # the command was printed


def test_the_launcher_of_preferences_trains_under_deepspeed(places, tmp_path):
    places["DATASET"] = save_preferences(random_pairs(22), tmp_path / "pairs")
    flags = ["--deepspeed", "ds_configs/zero2.json", "--max_steps", 2]
    launch(SH, "scripts/finetune_pp_dpo_trainer.sh", *FAST, *flags, **places)
    receipt = check_receipt("finetune_pp_dpo_trainer", places, {"max_steps": 2, "learning_rate": 5e-5})
    assert receipt["identity"]["rows_per_step"] == 2 * 8 * 2
    assert losses_of(places["OUTPUT_DIR"])[0] == pytest.approx(0.693147, abs=1e-5)


def test_a_trainer_launcher_trains_from_inside_its_folder(places):
    launcher = "finetune_pp_peft_trainer_lora"
    launch(SH, f"{launcher}.sh", *FAST, "--max_steps", 2, "--learning_rate", 3e-4, "--lora_rank", 4,
           folder=ROOT / "scripts", **places)  # fmt: skip
    receipt = check_receipt(launcher, places, {"learning_rate": 3e-4, "max_steps": 2, "lora_rank": 4})
    assert receipt["identity"]["rows_per_step"] == 2 * 16
    assert (places["OUTPUT_DIR"] / "adapter_model.safetensors").is_file()


def test_the_deepspeed_launcher_trains_by_absolute_path_in_a_folder_with_a_space(places, tmp_path):
    """A checkout without .venv: `python` is the one of the activated environment."""
    checkout = tmp_path / "my checkout"
    made = shutil.ignore_patterns(".git", ".venv", "models", "outputs", "tokenized", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, checkout, ignore=made)
    launcher = "finetune_pp_peft_trainer_deepspeed"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    path = (
        f"{tmp_path / 'bin'}:{os.environ['PATH']}"  # with the same ninja for DeepSpeed as elsewhere: another rebuilds
    )
    completed = launch(SH, checkout / "scripts" / f"{launcher}.sh", *FAST, "--max_steps", 2, "--lora_rank", 4,
                       folder=tmp_path, PATH=path, **places)  # fmt: skip
    assert "+ exec python -m torch.distributed.run --standalone" in completed.stderr
    receipt = check_receipt(launcher, places, {"max_steps": 2, "lora_rank": 4, "learning_rate": 1e-3})
    assert receipt["identity"]["rows_per_step"] == 2 * 2 * 8
    assert receipt["git_commit"] is None  # it ran in the copy
    assert (places["OUTPUT_DIR"] / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_all_weights_when_asked(places):
    launcher = "finetune_pp_peft_trainer_deepspeed"
    flags = ["--max_steps", 2, "--lora_used", "False", "--deepspeed", "ds_configs/zero2.json"]
    launch(SH, f"scripts/{launcher}.sh", *FAST, *flags, **places)
    overridden = {"lora_used": False, "deepspeed": "ds_configs/zero2.json", "learning_rate": 2e-5}
    check_receipt(launcher, places, overridden)
    assert (places["OUTPUT_DIR"] / "model.safetensors").is_file()


@pytest.mark.slow  # tests/test_equivalence.py has checkpointing in its default cells
def test_full_training_with_and_without_checkpointing_is_the_same_run(places, tmp_path):
    """Both launchers as they are, two processes, three epochs; the usual port is taken: one node needs none."""
    flags = [*FAST, "--num_train_epochs", 3, "--learning_rate", 1e-2]
    folders = [tmp_path / name for name in ("plain", "checkpointing")]
    with socket.socket() as holder:
        try:
            holder.bind(("", 29500))
            holder.listen()
        except OSError:
            pass  # another program holds it already
        for launcher, folder in zip((TRAINERS[0], TRAINERS[3]), folders, strict=True):
            launch(SH, f"scripts/{launcher}.sh", *flags, **places | {"OUTPUT_DIR": folder})
            receipt = check_receipt(launcher, places | {"OUTPUT_DIR": folder}, {"learning_rate": 1e-2})
            assert receipt["identity"]["rows_per_step"] == 2 * 16
            assert receipt["arguments"]["gradient_checkpointing"] is ("checkpointing" in launcher)
    losses = losses_of(folders[0])
    assert len(losses) == 3 and losses[2] < 0.99 * losses[1]  # the first step has a learning rate of 0: it warms up
    assert losses_of(folders[1]) == pytest.approx(losses_of(folders[0]), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------------
# Slurm: a stand-in for the scheduler, the launchers below it are real
# -------------------------------------------------------------------------------------------------------------------

SRUN = """
import json, os, pathlib, signal, subprocess, sys
words = sys.argv[1:]
command = words[next(i for i, word in enumerate(words) if not word.startswith("-")) :]
logs = pathlib.Path(os.environ["LOGS"])
(logs / "srun.json").write_text(json.dumps([words, os.environ.get("NODE_RANK")]))
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    node_environment = os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
    with open(logs / f"node{node}.txt", "a") as log:
        tasks.append(subprocess.Popen(command, env=node_environment, stdout=log, stderr=log))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def job(tmp_path, places):
    """Starts slurm.sbatch as slurmd does, from a copy elsewhere, with two nodes of one process each."""
    shims, logs, spool = (tmp_path / name for name in ("shims", "logs", "spool"))
    for folder in (shims, logs, spool):
        folder.mkdir()
    (shims / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (shims / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n'
    )
    for shim in shims.iterdir():
        shim.chmod(0o755)
    shutil.copy(ROOT / "scripts" / "slurm.sbatch", spool / "slurm_script")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_SUBMIT_DIR": ROOT / "scripts", "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "node[1-2]",
             "SLURM_JOB_ID": 4711, "SLURM_CPUS_PER_TASK": 3, "SLURM_GPUS_ON_NODE": 1, "LOGS": logs,
             "PATH": f"{shims}:{os.environ['PATH']}", "MASTER_PORT": port}  # fmt: skip
    variables = slurm | places | {"USE_CPU": 1, "OMP_NUM_THREADS": 1, "LAUNCHER": "finetune_pp_peft_trainer_lora.sh"}
    started = []

    def start(*flags) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                ["bash", str(spool / "slurm_script"), *map(str, flags)],
                cwd=tmp_path,
                env=clean_environment(**{name: str(value) for name, value in variables.items()}),
                stderr=subprocess.DEVNULL,
            )
        )
        return started[-1]

    start.logs = logs
    yield start
    for process in started:  # a test that failed half-way leaves no process behind
        process.terminate()
        process.wait()


def output_of(job) -> str:
    return "\n".join(path.read_text() for path in sorted(job.logs.glob("node*.txt")))


def test_slurm_runs_one_launcher_on_every_node(job, places):
    process = job(*FAST, "--max_steps", 2, "--learning_rate", 3e-4)
    assert process.wait() == 0, output_of(job)
    words, rank_in_the_batch_shell = json.loads((job.logs / "srun.json").read_text())
    assert "--cpus-per-task=3" in words and rank_in_the_batch_shell is None
    overridden = {"learning_rate": 3e-4, "max_steps": 2, "resume_from_checkpoint": "True"}
    check_receipt("finetune_pp_peft_trainer_lora", places, overridden)
    assert "starting from the beginning" in output_of(job)
    for node in range(2):
        assert f"--nnodes 2 --node-rank {node} " in (job.logs / f"node{node}.txt").read_text()


@pytest.mark.slow
def test_a_preempted_slurm_job_is_saved_and_goes_on_when_it_is_requeued(job, places):
    folder, flags = places["OUTPUT_DIR"], [*FAST, "--max_steps", 60]
    process = job(*flags)
    while "'loss'" not in output_of(job):
        assert process.poll() is None, output_of(job)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    step = int(re.search(r"SIGTERM: step (\d+) is saved", output_of(job)).group(1))
    assert 1 <= step < 60
    assert (folder / f"checkpoint-{step}" / "settings.json").is_file() and not (folder / "run.json").exists()

    assert job(*flags).wait() == 0, output_of(job)
    assert f"resuming from {folder}/checkpoint-{step}" in output_of(job)
    assert len(losses_of(folder)) == 60 and receipt_of(folder)["world_size"] == 2


def test_slurm_settings_let_a_job_be_preempted_and_requeued():
    settings = re.findall(r"^#SBATCH --(.*)$", text_of("slurm.sbatch"), re.MULTILINE)
    assert {"ntasks-per-node=1", "signal=TERM@120", "requeue"} <= set(settings)
    lines = text_of("slurm.sbatch").splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])  # Slurm reads none behind the first command
