#!/usr/bin/env bash
# Set up and run every check: tests/run.sh [--slow] [pytest arguments...]
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source src/environment.sh
choose_environment requirements.txt tests/requirements.txt
fill_environment requirements.txt tests/requirements.txt

if [[ "${1:-}" == --slow ]]; then shift; else set -- -m "not slow" "$@"; fi
"$python" -m ruff check .
"$python" -m mypy src
# two files at a time: most of the time goes into starting Python
exec "$python" -m pytest -n 2 --dist loadfile "$@"
