# shellcheck shell=bash
# Sourced by the bash scripts in this folder. `set_up [EXTRA]` changes to the root of the checkout, creates a
# virtual environment with Graft if there is none or pyproject.toml has changed, and sets $PYTHON to its Python.
# On Linux it also installs a fast BLAS and a C++ compiler, which MLX's CPU backend calls at run time.
#
#   GRAFT_VENV      the virtual environment (default: .venv in the checkout)
#   GRAFT_PYTHON    the Python to create it with (default: the first suitable one on the PATH)
#   GRAFT_BACKEND   cuda: MLX's CUDA build (Linux)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${GRAFT_VENV:-$ROOT/.venv}
PYTHON=$VENV/bin/python

set_up() {
    cd "$ROOT" || exit
    local extras stamp state
    extras=${1:-}${GRAFT_BACKEND:+${1:+,}$GRAFT_BACKEND}
    stamp=$VENV/.graft${extras:+-$extras}
    state="$ROOT $(cksum <pyproject.toml)"
    # An environment with more extras will do, too: .graft-dev if .graft is wanted.
    if grep -qsxF "$state" "$stamp"*; then
        return
    fi
    say "Setting up $VENV: this takes a minute or two, once"
    make_environment
    pip_install --editable ".${extras:+[$extras]}" || fail "pip could not install Graft; see above"
    if [ "$(uname -s)" = Linux ] && [ "${GRAFT_BACKEND:-}" != cuda ]; then
        see_to_blas
        see_to_compiler
    fi
    echo "$state" >"$stamp"
}

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 2
}

# Python compiles what it imports; compiling all of every package first takes longer than installing it.
pip_install() { "$PYTHON" -m pip install --no-compile --quiet --disable-pip-version-check "$@"; }

make_environment() {
    # An incomplete environment has no pip; creating it again completes it.
    if "$PYTHON" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python) || fail "no Python 3.11 or newer (on a Mac: native arm64) on the PATH;" \
        "install one, or set GRAFT_PYTHON"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        apt_install python3-venv || fail "$python has no ensurepip; install it" \
            "(Debian, Ubuntu: apt-get install python3-venv), or name another in GRAFT_PYTHON"
    fi
    "$python" -m venv "$VENV" || fail "$python could not create $VENV; see above"
}

find_python() {
    local python
    for python in "${GRAFT_PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import platform, sys
sys.exit(sys.version_info < (3, 11) or (sys.platform, platform.machine()) == ("darwin", "x86_64"))' \
            >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    return 1
}

see_to_blas() {
    if has_fast_blas || { apt_install libopenblas0-pthread && has_fast_blas; }; then
        return
    fi
    if [ "$(uname -m)" = x86_64 ] && pip_install mkl && has_fast_blas; then
        return
    fi
    say "no fast BLAS: matrix products will be 30 to 80 times slower; install OpenBLAS and run this again"
    return 0
}

has_fast_blas() {
    "$PYTHON" -c 'import sys; from graft.runtime import blas; sys.exit(blas.loaded() is None)' 2>/dev/null
}

see_to_compiler() {
    if ! command -v g++ >/dev/null && ! apt_install g++; then
        say "no C++ compiler: MLX will run uncompiled, which is slower; install g++"
    fi
}

apt_install() {
    local sudo=
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" != 0 ]; then
        sudo=sudo
        sudo -n true 2>/dev/null || return 1
    fi
    say "Installing $1 with apt-get"
    local get=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=2)
    local install=("${get[@]}" install -y --no-install-recommends "$1")
    # Package lists may be missing or old: the second try updates them and shows its output.
    $sudo "${install[@]}" >/dev/null 2>&1 || { $sudo "${get[@]}" update && $sudo "${install[@]}"; } >&2
}
