#!/usr/bin/env bash
# All checks: style, then the tests. Arguments go to pytest: bash scripts/test.sh -k resume
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

install requirements-dev.txt
log "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
log "pytest"
# Two workers with one thread each: the tests are many small processes, which would fight over the cores otherwise.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadgroup --durations=10 "$@"
