#!/usr/bin/env bash
# Fine-tune:  ./start_instruct_training.sh [NPROC] [RESUME] [flags of src/train_instruct.py...]
#             NPROC   processes, one a GPU (default 1; without a GPU they share the CPU)
#             RESUME  a checkpoint file, latest, or auto: latest if a run is there, else a new one
#             flags   --help lists them
# Try it out: ./start_instruct_training.sh demo
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
unset CDPATH
trap '' USR1  # which asks a run to save, must not end the launcher before it can pass it on
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
source src/environment.sh

if [[ "${1:-}" == demo ]]; then
    shift
    source src/demo.sh "$@"
    exit
fi
for flag in "$@"; do
    [[ $flag == -h || $flag == --help ]] || continue
    for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} .venv/bin/python python3; do  # it needs no packages
        [ -n "$(lacks "$python")" ] || exec "$python" src/train_instruct.py --help
    done
done

use_environment
nproc=1
[[ "${1:-}" =~ ^[0-9]+$ ]] && { nproc=$1; shift; }
[[ $# -gt 0 && "$1" != -* ]] && set -- --resume "$@"
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m training.launch "$nproc" "$@"
