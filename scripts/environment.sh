# Sourced by quickstart.sh and test.sh from the root of the repository: `install [requirements-dev.txt]` makes .venv.

log() { printf '\n== %s\n' "$*"; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: transformers 5 needs Python 3.11 or newer, and ${PYTHON:-python3} is" \
    "$("${PYTHON:-python3}" --version 2>&1 || true); install one and name it: PYTHON=/path/to/python3.11 bash $0" >&2
  return 1
}

# Without an NVIDIA GPU the CPU build saves gigabytes; the PyTorch project's own index has it, plain PyPI may not.
install_torch() {
  local torch index=https://download.pytorch.org/whl/cpu
  torch=$(grep '^torch==' requirements.txt)
  if ! nvidia-smi >/dev/null 2>&1 &&
    .venv/bin/python -c "import urllib.request as u; u.urlopen('$index/', timeout=5)" 2>/dev/null &&
    .venv/bin/python -m pip install --index-url "$index" "$torch"; then
    return
  fi
  .venv/bin/python -m pip install "$torch"
}

# Written last: an interrupted installation is gone through again, and pip skips what is there.
marker() {
  echo ".venv/.complete-$(cat requirements.txt "$@" | cksum | cut -d' ' -f1)"
}

install() {
  local python
  if [ -f "$(marker "$@")" ] && [ -x .venv/bin/python ]; then
    log "environment: .venv is complete"
    return
  fi
  python=$(find_python)
  log "environment: .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    echo "error: $python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
    return 1
  }
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  install_torch
  grep -v '^deepspeed==' requirements.txt >.venv/requirements.txt
  .venv/bin/python -m pip install -r .venv/requirements.txt
  # DeepSpeed looks at the installed torch while it is built, so it comes last and without build isolation.
  DS_BUILD_OPS=0 .venv/bin/python -m pip install --no-build-isolation "$(grep '^deepspeed==' requirements.txt)" ||
    echo "warning: DeepSpeed could not be installed; only finetune_pp_peft_trainer_deepspeed.py needs it" >&2
  if [ "$#" -gt 0 ]; then
    .venv/bin/python -m pip install -r "$1"
  fi
  touch "$(marker)" "$(marker "$@")"
}
