#!/usr/bin/env bash
# Chat: ./chat.sh [CHECKPOINT | demo] [flags of src/chat.py...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source src/environment.sh
use_environment

checkpoint=()
if [[ "${1:-}" == demo ]]; then
    checkpoint=(--checkpoint demo/checkpoints/best_model.pt)
    shift
elif [[ $# -gt 0 && "$1" != -* ]]; then
    checkpoint=(--checkpoint "$1")
    shift
fi
exec "$python" src/chat.py "${checkpoint[@]}" "$@"
