#!/usr/bin/env bash
# Executes the compiled kernels without a GPU, and looks for races in their machine code.
#
#   ttsem compiles each launch for sm_90 and executes it on a CPU: accesses out of bounds, races between programs, reads
#   of memory that nothing was written to, wrong values. It needs Python >= 3.12 and an environment of its own, of some
#   gigabytes, which this makes; torch and Triton are those that it was made for. Set PYTHON to choose an interpreter.
#   sentryward looks for races and missing barriers in the PTX of kernels whose blocks exchange numbers, clusters
#   included; it runs with the newest Triton, in the environment of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-compiled
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

# pyenv's shims are on the PATH for versions that are installed and do not run.
python=
for candidate in ${PYTHON_COMPILED:-python3.12 python3.13 python3} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    if new_enough "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "make test-compiled: skipped, ttsem needs Python >= 3.12 and none was found; set PYTHON_COMPILED to one" >&2
    exit 0
fi

if [ ! -f $venv/.installed ] || [ pyproject.toml -nt $venv/.installed ] || [ scripts/test_compiled.sh -nt $venv/.installed ]; then
    [ -x $venv/bin/python ] || "$python" -m venv $venv
    pinned=(torch==2.14.0 triton==3.8.0 ttsem==0.1.0)  # what ttsem 0.1.0 was made for
    $venv/bin/python -m pip install -q "${pinned[@]}"
    $venv/bin/python -m pip install -q "${pinned[@]}" -e '.[test]'
    touch $venv/.installed
fi

unset TRITON_INTERPRET
execute() { $venv/bin/python -m ttsem.sanitize pytest -q -p no:cacheprovider --tb short "$@"; }
status=0

# Two processes: what ttsem executes cannot be spread over pytest's workers.
{
    execute tests/test_kernels.py
    .venv/bin/python -m pytest -q tests/test_synchronization.py
} >"$work/kernels.log" 2>&1 &
kernels=$!
{
    execute tests/test_errors.py tests/test_planner.py tests/test_linear.py tests/test_compile.py
    execute tests/test_autograd.py tests/test_no_hidden_state.py -k "inplace or two_losses"
    $venv/bin/python -m pytest -q tests/test_planted_bugs.py
} >"$work/others.log" 2>&1 || status=$?
cat "$work/others.log"
wait $kernels || status=$?
cat "$work/kernels.log"
exit $status
