#!/usr/bin/env bash
# Every check, with the Python in $PYTHON or the active one; run-tests.sh sets one up first.
# Arguments go to pytest. All checks run, also after one has failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

status=0
check() {
    printf '\n== %s\n' "$*"
    "${PYTHON:-python}" -m "$@" || status=1
}

check ruff check
check ruff format --check
check mypy
# One process per core; a test file stays in one of them.
check pytest --numprocesses auto --dist loadfile "$@"
exit $status
