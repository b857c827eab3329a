#!/usr/bin/env bash
# Sets up an environment for development and runs every check. Arguments go to pytest, for instance:
#
#   run-tests.sh --slow                     the slow tests too
#   run-tests.sh tests/runtime/test_blas.py -k mkl
#
# GRAFT_TEST_REFERENCE=1 adds PEFT and PyTorch's CPU build, where pip finds it, for the tests that compare with them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev

if [ "${GRAFT_TEST_REFERENCE:-}" = 1 ] && ! "$PYTHON" -c 'import torch, peft' 2>/dev/null; then
    torch=torch==2.13.0
    # Without the suffix, Linux would get gigabytes of CUDA libraries.
    if [ "$(uname -s)" = Linux ]; then torch=$torch+cpu; fi
    pip_install "$torch" peft || say "PyTorch or PEFT cannot be had: the tests that compare with them are skipped"
fi

export PYTHON
exec bash scripts/check.sh "$@"
