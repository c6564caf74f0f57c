#!/usr/bin/env bash
# Compiles every kernel ahead of time with another Triton, in an environment of its own:  compile_with_old_triton.sh 3.6.0
# numpy < 2.4: with a later one, the interpreter of Triton 3.6 does not work.
set -euo pipefail
cd "$(dirname "$0")/.."
triton=${1:?usage: compile_with_old_triton.sh VERSION}
venv=.venv-triton-$triton
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install -q torch==2.13.0
"$venv/bin/python" -m pip install -q "triton==$triton" 'numpy<2.4' \
    rich safetensors tqdm psutil pytest pytest-timeout hypothesis expecttest
PYTHONPATH=. "$venv/bin/python" -m pytest tests/kernels/test_compilation.py tests/kernels/test_launch.py "${@:2}"
