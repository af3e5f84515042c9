# Sourced by the launchers: which Python they use. An active environment (venv, uv, conda) that has what is needed comes
# first, then .venv, then python3. Nothing is ever installed but into .venv, by the demo and tests/run.sh.

fail() {
    echo "error: $*" >&2
    exit 2
}

case "$(uname -s)" in
    Linux) ;;
    Darwin) echo "note: nobody has tried this on macOS; one process should work, with --device mps or cpu" >&2 ;;
    *) fail "this needs Linux; on Windows use WSL2: wsl --install, then the same commands in its shell" ;;
esac

lacks() {  # PYTHON FILES...: prints what it lacks of the packages that the files name; nothing if it has all
    local python=$1
    shift
    "$python" - "$@" 2> /dev/null << 'END' || echo "a Python that starts"
import re, sys
lacking = []
if sys.version_info < (3, 10):
    lacking.append("Python 3.10 (it is %d.%d)" % sys.version_info[:2])
else:
    from importlib.metadata import version
    for name in dict.fromkeys(re.findall(r"^[\w-]+", "\n".join(open(file).read() for file in sys.argv[1:]), re.M)):
        try:
            found, least = version(name), {"torch": (2, 11), "tiktoken": (0, 8)}.get(name)
            if least and tuple(map(int, found.split(".")[:2])) < least:
                lacking.append("%s %d.%d (it is %s)" % (name, *least, found))
        except Exception:
            lacking.append(name)
print(", ".join(lacking))
END
}

fill_command() {  # PYTHON FILES...: prints what would install them; environments of uv have no pip
    local how="uv pip install --python $1"
    "$1" -m pip --version > /dev/null 2>&1 && how="$1 -m pip install"
    shift
    echo "$how$(printf ' -r %s' "$@")"
}

choose_environment() {  # FILES...: sets $python, and $lacking: empty, or what is to be installed into .venv first
    local active="" how
    why=""  # the active environment is not used
    for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} \
        .venv/bin/python python3; do
        lacking=$(lacks "$python" "$@")
        if [ -z "$lacking" ]; then
            [ -z "$why" ] || echo "note: $why; using $python" >&2
            return 0
        fi
        case "$python" in
            .venv/*) [ ! -x "$python" ] || return 0 ;;
            python3) ;;
            *)
                why=${why:-the active environment ${python%/bin/python} lacks $lacking}
                # conda activates base by itself, and nobody has to fill it
                [ "$python ${CONDA_DEFAULT_ENV:-}" != "${CONDA_PREFIX:-}/bin/python base" ] || continue
                [ ! -x "$python" ] || active=${active:-$python} ;;
        esac
    done
    [ -n "$active" ] || return 0
    how="to fill it: $(fill_command "$active" "$@")"
    [ -z "$(lacks "$active")" ] || how="install a newer one"
    fail "$why; $how; or deactivate it, and ./start_instruct_training.sh demo makes .venv"
}

use_environment() {  # sets $python, or fails with what to do
    choose_environment requirements.txt
    [ -z "$lacking" ] || fail "no environment with the requirements (${why:+$why, }$python lacks $lacking); run" \
        "./start_instruct_training.sh demo, or: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
}

fill_environment() {  # FILES...: after choose_environment; makes .venv and installs what is lacking, into it alone
    [ -n "$lacking" ] || return 0
    [ -z "$(lacks "$python")" ] || fail "$python is missing or older than 3.10; install a newer Python" \
        "(and move a .venv of the older one away)"
    [ "$python" = .venv/bin/python ] || python3 -m venv .venv || fail "cannot make .venv (move a broken" \
        "one away; on Debian and Ubuntu: apt install python3-venv)"
    python=.venv/bin/python
    "$python" -m pip --version > /dev/null 2>&1 || fail ".venv has no pip; to fill it: $(fill_command "$python" \
        "$@"); or move it away, if another Python made it"
    [ -z "$why" ] || echo "note: $why; using .venv" >&2
    echo "installing $* into .venv, which may take minutes" >&2
    "$python" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || fail "pip could not" \
        "install $*"
}
