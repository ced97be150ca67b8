# Sourced by quickstart.sh and test.sh from the root of the repository: `install [requirements-dev.txt]` makes .venv.

step=environment  # what is being done, for the message of a run that is stopped
log() {
  step="$*"
  printf '\n== %s\n' "$step"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: transformers 5 needs Python 3.11 or newer, and ${PYTHON:-python3} is" \
    "$("${PYTHON:-python3}" --version 2>&1 || true); install one, for example by \"uv python install 3.12\" or" \
    "\"conda create -n python312 python=3.12\", and name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

# The first number of the NVIDIA driver's version, such as 580; nothing without a GPU that works.
driver_version() {
  nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -oE '^[0-9]+' | head -n 1 || true
}

# Free space where the repository lies, in MB; nothing if it cannot be found out.
free_megabytes() {
  local free
  { read -r _ && read -r _ _ _ free _; } < <(df -Pm . 2>/dev/null) && echo "$free" || true
}

# .venv (1.8 GB without CUDA) and the sample model (0.6 GB, and 0.1 GB for its download) must find room. CUDA's libraries
# take some more GB, which is not known beforehand.
check_disk() {
  local free
  free=$(free_megabytes)
  if [ -n "$free" ] && [ "$free" -lt 3000 ]; then
    echo "error: the disk of $PWD has $free MB free, and .venv and the sample model need 3000 MB;" \
      "make room, or move the repository to a larger disk" >&2
    return 1
  fi
  if [ -n "$free" ] && [ "$free" -lt 9000 ] && [ -n "$(driver_version)" ]; then
    echo "warning: the disk of $PWD has $free MB free, which may be too little for PyTorch with CUDA" >&2
  fi
}

# pip install, and one sentence about the usual reasons if it fails. pip itself keeps what is already installed.
pip_install() {
  local free
  .venv/bin/python -m pip install "$@" && return
  free=$(free_megabytes)
  if [ -n "$free" ] && [ "$free" -lt 300 ]; then
    echo "error: pip stopped because the disk is full: $free MB are free on that of $PWD; make room and start again" >&2
    return 1
  fi
  echo "error: pip could not install that; its lines above say why. If PyPI cannot be reached: behind a proxy," \
    "export HTTPS_PROXY=http://HOST:PORT; from China, export PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple;" \
    "then start again, and what is installed already is kept" >&2
  return 1
}

# The build of PyTorch that the driver can run: cpu, cu126 or cu130. CUDA 13 needs driver 580, CUDA 12 driver 525:
# https://docs.nvidia.com/deploy/cuda-compatibility
torch_build() {
  local driver
  driver=$(driver_version)
  if [ -z "$driver" ]; then
    echo cpu
  elif [ "$driver" -ge 580 ]; then
    echo cu130
  elif [ "$driver" -ge 525 ]; then
    echo cu126
  else
    echo "warning: NVIDIA driver $driver is too old for PyTorch's CUDA 12, so the CPU build is installed;" \
      "update the driver to 525 or newer, delete .venv, and start again to train on the GPU" >&2
    echo cpu
  fi
}

# The PyTorch project's own index has all builds; plain PyPI has the one for CUDA 13.
install_torch() {
  local torch build index
  torch=$(grep '^torch==' requirements.txt)
  build=$(torch_build)
  index=https://download.pytorch.org/whl/$build
  log "PyTorch: $torch, build $build"
  if [ "$build" = cu126 ]; then
    .venv/bin/python -m pip install --index-url "$index" "$torch" && return
    echo "error: NVIDIA driver $(driver_version) needs PyTorch's build for CUDA 12.6 from $index, which could not be" \
      "installed; update the driver to 580 or newer, whose build PyPI has, or install torch into .venv by hand" >&2
    return 1
  fi
  # Without an NVIDIA GPU the CPU build saves gigabytes.
  if [ "$build" = cpu ] &&
    .venv/bin/python -c "import urllib.request as u; u.urlopen('$index/', timeout=5)" 2>/dev/null &&
    .venv/bin/python -m pip install --index-url "$index" "$torch"; then
    return
  fi
  pip_install "$torch"
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
  [ -d .venv ] || check_disk
  "$python" -m venv .venv || {
    echo "error: $python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
    return 1
  }
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  install_torch
  grep -v '^deepspeed==' requirements.txt >.venv/requirements.txt
  pip_install -r .venv/requirements.txt
  # DeepSpeed looks at the installed torch while it is built, so it comes last and without build isolation. Where there
  # is a GPU it would also ask for nvcc, which PyTorch does not bring, although no operator is built here.
  DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 \
    .venv/bin/python -m pip install --no-build-isolation "$(grep '^deepspeed==' requirements.txt)" ||
    echo "warning: DeepSpeed could not be installed; only finetune_pp_peft_trainer_deepspeed.py needs it" >&2
  if [ "$#" -gt 0 ]; then
    pip_install -r "$1"
  fi
  touch "$(marker)" "$(marker "$@")"
}
