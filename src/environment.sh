# Sourced by the launchers: which Python they use. An active environment comes first, then .venv.

use_environment() {  # sets $python, or fails with what to do
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        python=$(command -v python)
    elif [ -x .venv/bin/python ]; then
        python=.venv/bin/python
    elif python3 -c 'import torch, tiktoken' 2>/dev/null; then
        python=$(command -v python3)
    else
        echo "error: no environment with the requirements; run ./start_instruct_training.sh demo, or: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt" >&2
        exit 2
    fi
}

make_environment() {  # like use_environment, but makes .venv where nothing is active; installs the files named
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ ! -x .venv/bin/python ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
            echo "error: python3 is missing or older than 3.10; install a newer Python" >&2
            exit 2
        }
        python3 -m venv .venv || {
            echo "error: cannot make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 2
        }
    fi
    use_environment
    local file arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    "$python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" || {
        echo "error: pip could not install $*" >&2
        exit 2
    }
}
