#!/usr/bin/env bash
# Looks for races in the kernels' machine code, and executes the compiled kernels, both without a GPU.
#
#   sentryward looks for races and missing barriers in the PTX of kernels whose threads exchange numbers, clusters
#   included; it runs with the newest Triton, in the environment of `make test`.
#   ttsem compiles each launch for sm_90 and executes it on a CPU: accesses out of bounds, races between programs, reads
#   of memory that nothing was written to, wrong values. It needs Python >= 3.12 and an environment of its own, of some
#   gigabytes, which this makes; torch and Triton are those that it was made for. Set PYTHON_COMPILED to choose the
#   interpreter. Where there is none, that half is left out and this says so.
set -euo pipefail
cd "$(dirname "$0")/.."
newest=${VENV:-.venv}
venv=.venv-compiled
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset TRITON_INTERPRET

races() {
    "$newest"/bin/python -c 'import sys; sys.path.insert(0, "tests"); from helpers import ptx_races; sys.exit(ptx_races.problem())'
    "$newest"/bin/python -m pytest -q -p no:cacheprovider tests/kernels/test_synchronization.py
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

# pyenv's shims are on the PATH for versions that are installed and do not run.
python=
for candidate in ${PYTHON_COMPILED:-python3.12 python3.13 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python}; do
    if new_enough "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    races
    echo "make test-compiled: kernels were not executed: ttsem needs Python >= 3.12, and none was found" >&2
    exit 0
fi

if [ ! -f $venv/.installed ] || [ pyproject.toml -nt $venv/.installed ] || [ scripts/test_compiled.sh -nt $venv/.installed ]; then
    [ -x $venv/bin/python ] || "$python" -m venv $venv
    pinned=(torch==2.14.0 triton==3.8.0 ttsem==0.1.0)  # what ttsem 0.1.0 was made for
    $venv/bin/python -m pip install -q "${pinned[@]}"
    $venv/bin/python -m pip install -q "${pinned[@]}" -e '.[test]'
    touch $venv/.installed
fi

execute() { $venv/bin/python -m ttsem.sanitize pytest -q -p no:cacheprovider --tb short "$@"; }

# Two jobs: what ttsem executes cannot be spread over pytest's workers. Each ends at its first failing command.
(set -e
    execute tests/kernels/test_{kernels,shard_kernels}.py
    races
) >"$work/kernels.log" 2>&1 &
kernels=$!
(set -e
    execute tests/losses/test_{errors,backends,modules,linear_calls}.py tests/kernels/test_planner.py tests/ops/test_compile.py
    execute tests/ops/test_{autograd,gradients_in_place,changes_before_backward}.py tests/losses/test_no_hidden_state.py -k "inplace or two_losses"
    $venv/bin/python -m pytest -q -p no:cacheprovider tests/kernels/test_planted_bugs.py
) >"$work/others.log" 2>&1 &
others=$!
status=0
wait $kernels || status=$?
cat "$work/kernels.log"
wait $others || status=$?
cat "$work/others.log"
exit $status
