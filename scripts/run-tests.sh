#!/usr/bin/env bash
# Sets up a development environment and runs all checks. Arguments are passed to pytest, for instance:
#
#   run-tests.sh --slow                     also the slow tests
#   run-tests.sh tests/runtime/test_blas.py -k mkl
#
# GRAFT_TEST_REFERENCE=1 also installs PEFT and PyTorch's CPU build, if pip finds it, for the tests that compare with them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev

if [ "${GRAFT_TEST_REFERENCE:-}" = 1 ] && ! "$PYTHON" -c 'import torch, peft' 2>/dev/null; then
    torch=torch==2.13.0
    # Without the suffix, pip would download gigabytes of CUDA libraries on Linux.
    if [ "$(uname -s)" = Linux ]; then torch=$torch+cpu; fi
    pip_install "$torch" peft || say "PyTorch or PEFT could not be installed: the tests that compare with them are skipped"
fi

export PYTHON
exec bash scripts/check.sh "$@"
