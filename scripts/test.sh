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
.venv/bin/python -m pytest -q -m "not slow" --durations=10 "$@"
