"""The shell scripts and both READMEs: every command is run, in a copy of the repository whose sample model is tiny."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, WITHOUT_BITSANDBYTES, save_tiny_model

pytestmark = pytest.mark.xdist_group("quickstart")  # one worker, so that its slow fixture is made once
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = ["bash", "cat", "cksum", "cut", "dirname", "grep", "touch", "env", "uname"]


def copy_repository(target: Path) -> Path:
    """The files of the repository without what runs have made, a complete .venv, and a tiny model as the sample."""
    made = shutil.ignore_patterns(".git", ".venv", "models", "outputs", "tokenized", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, target, ignore=made)
    environment = target / ".venv"
    (environment / "bin").mkdir(parents=True)
    # The programs are links, but python is started by its own path: where PyTorch has another one, DeepSpeed compiles
    # anew, for two minutes.
    for path in Path(sys.executable).parent.iterdir():
        (environment / "bin" / path.name).symlink_to(path)
    for name in ("python", "python3"):
        (environment / "bin" / name).unlink()
        (environment / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (environment / "bin" / name).chmod(0o755)
    marker = subprocess.run(
        ["bash", "-c", "source scripts/environment.sh; marker"], cwd=target, capture_output=True, text=True, check=True
    ).stdout.strip()
    if not (target / marker).exists():
        (target / marker).touch()
    sample = save_tiny_model(target / "models" / "SmolLM2-135M-Instruct")
    (sample / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = json.loads((sample / "config.json").read_text())
    (sample / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))  # as the real one has
    return target


def run(command: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    """Runs a shell command as a reader would type it with the environment activated."""
    path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | WITHOUT_BITSANDBYTES | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("quickstart") / "repository")


def test_the_quickstart_goes_from_a_model_to_a_table(repository):
    """Killed while it trains, then run again; a third run skips all that is complete."""
    started = subprocess.Popen(
        ["bash", "scripts/quickstart.sh"],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | WITHOUT_BITSANDBYTES,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run_folder = repository / "outputs" / "finetune_pp_peft"
    while not (run_folder / "runs").exists():
        assert started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (run_folder / "run.json").exists()

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

    receipt = (run_folder / "run.json").stat().st_mtime_ns
    again = run("sh scripts/quickstart.sh", repository / "scripts" / "..")
    assert again.returncode == 0
    assert "evaluating" not in again.stderr and "training:" not in again.stderr
    assert (run_folder / "run.json").stat().st_mtime_ns == receipt


def commands_of(readme: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme_runs(repository):
    """As printed, one after the other. The two long ones are what .ci/run consists of."""
    commands = commands_of("README.md")
    assert commands[:3] == ["bash scripts/quickstart.sh", "bash scripts/test.sh", "source .venv/bin/activate"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in commands[:2])
    if not (repository / "outputs" / "finetune_pp_peft" / "run.json").exists():
        assert run(commands[0], repository).returncode == 0
    assert len(commands) >= 8
    for command in commands[2:]:
        started = time.perf_counter()
        completed = run(command, repository)
        print(f"{time.perf_counter() - started:5.1f} s  {command}")
        assert completed.returncode == 0, f"{command}\n{completed.stdout}\n{completed.stderr}"


def test_both_readmes_have_the_same_commands_flags_and_files():
    assert commands_of("README.md") == commands_of("README_zh.md")
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert set(re.findall(r"`(--?\w[^`]*|\w+\.(?:py|sh|json))`", english)) == set(
        re.findall(r"`(--?\w[^`]*|\w+\.(?:py|sh|json))`", chinese)
    )
    tree = re.compile(r"^ {0,2}([\w.]+\.(?:py|sh|jsonl?)|\w+/) ", re.MULTILINE)
    assert set(tree.findall(english)) == set(tree.findall(chinese))
    assert english.count("\n## ") == chinese.count("\n## ")


def test_the_readmes_show_the_strategies_as_they_were_measured():
    """docs/strategies.md is what benchmarks/strategies.py wrote; its figures stand in both READMEs."""
    tables = [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text if line.startswith("|")]
        for text in (
            (ROOT / name).open(encoding="utf-8") for name in ("docs/strategies.md", "README.md", "README_zh.md")
        )
    ]
    head = tables[0][0]
    columns = [head.index(name) for name in ("devices", "tokens/s", "MFU", "peak memory of each process, MB")]
    measured = [
        [row[column] for column in columns] for row in tables[0] if len(row) == len(head) and row[4].isdecimal()
    ]
    assert len(measured) >= 11
    for table in tables[1:]:
        first = next(i for i, row in enumerate(table) if row[1:] == measured[0])
        assert [row[1:] for row in table[first : first + len(measured)]] == measured


def test_the_file_tree_of_the_readme_names_every_file():
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in map(Path, tracked.stdout.split()):
        if path.suffix in (".py", ".sh", ".jsonl") and path.parts[0] != "tests" and path.name != "__init__.py":
            assert path.name in text, path


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
