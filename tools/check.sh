#!/usr/bin/env bash
# Checks of the checkout as a whole: lint, format, types, shell scripts, then documents and the rules of the repository.
#
#   bash tools/check.sh
#
# Needs the environment (tools/environment.sh). Everything is checked, whatever else fails; the status says whether all
# passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONDONTWRITEBYTECODE=1
failed=""

# NAME COMMAND...: says what failed and goes on.
check() {
  local name=$1
  shift
  "$@" || { echo "check: $name failed" >&2; failed+=" $name"; }
}

# Types take as long as everything else together.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
.venv/bin/python -m mypy >"$types" 2>&1 &
mypy=$!
check lint .venv/bin/python -m ruff check --quiet
check format .venv/bin/python -m ruff format --check --quiet
check shell .venv/bin/shellcheck --external-sources --source-path . .ci/run slurm/*.sh tools/*.sh examples/*.sh tests/*.sh
check repository .venv/bin/python -m pytest -q tests/checkout
check types wait "$mypy"
cat "$types"
[ -z "$failed" ] || { echo "check: failed:$failed" >&2; exit 1; }
