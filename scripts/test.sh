#!/usr/bin/env bash
# All checks: style, then the tests. Arguments go to pytest: bash scripts/test.sh -k resume
# The tests that run inside pytest come first and take about two minutes; those that start programs take the rest.
# They run on the CPU; where there is a GPU, tests/test_gpu.py trains every script on it, and on two where there are two.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# Two workers with one thread each: the tests are many small processes, which would fight over the cores otherwise.
run_tests() {
  local status=0
  OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadgroup --durations=10 "$@" || status=$?
  [ "$status" = 5 ] || return "$status"  # 5: no test of this kind was asked for
}

install requirements-dev.txt
log "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
log "pytest: texts, data, collator, converter"
run_tests -m "not processes and not matrix and not slow" "$@"
log "pytest: scripts and tools, started as a user starts them"
run_tests -m "processes and not matrix and not slow" "$@"
