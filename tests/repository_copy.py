"""A copy of the repository for tests that run commands in it as a reader types them: its sample model is tiny."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, WITHOUT_BITSANDBYTES, save_tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


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
