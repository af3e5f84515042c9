#!/usr/bin/env bash
# Set up and run every check: tests/run.sh [--slow] [pytest arguments...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source src/environment.sh
make_environment requirements.txt tests/requirements.txt

marks=(-m "not slow")
[[ "${1:-}" == --slow ]] && { marks=(); shift; }
"$python" -m ruff check .
"$python" -m mypy src
# two files at a time: most of the time goes into starting Python
exec "$python" -m pytest -n 2 --dist loadfile "${marks[@]}" "$@"
