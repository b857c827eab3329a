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
# One process per core, each with one BLAS thread: more of them only wait for each other. A process
# without tests left takes over half of another's; by file, one long file would be the last for minutes.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
check pytest --numprocesses auto --dist worksteal "$@"
exit $status
