#!/usr/bin/env bash
# Chat: ./chat.sh [CHECKPOINT | demo] [flags of src/chat.py...], from any folder
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
unset CDPATH
here=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
project=$PWD
source src/environment.sh
use_environment
python=$("$python" -c 'import sys; print(sys.executable)')  # python3 may be another one elsewhere (pyenv)

if [[ "${1:-}" == demo ]]; then
    checkpoint=$project/demo/checkpoints/best_model.pt
    [[ -e $checkpoint ]] || checkpoint=$project/demo/checkpoints/latest.pt  # of a demo that was interrupted
    if [[ ! -e $checkpoint ]]; then
        echo "error: no demo yet; run ./start_instruct_training.sh demo first" >&2
        exit 2
    fi
    set -- --checkpoint "$checkpoint" "${@:2}"
elif [[ $# -gt 0 && "$1" != -* ]]; then
    set -- --checkpoint "$@"
fi
cd "$here"  # files are found where the user stands, or else in the project
exec "$python" "$project/src/chat.py" "$@"
