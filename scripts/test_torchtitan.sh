#!/usr/bin/env bash
# Runs the tests of PDL in torchtitan 0.3.0, in an environment of its own: torchtitan wants an older `datasets` than TRL.
# Arguments go to pytest. Set PYTHON to choose the interpreter.
#
# TORCH=2.14.0 TRITON=3.8.0 VENV=.venv-torchtitan-2.14 runs more of them: torchtitan's default backend for several
# processes and its pipelines need torch 2.14, whose builds for Linux are CUDA builds of some gigabytes (no GPU needed).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv-torchtitan}
pinned=("torch==${TORCH:-2.13.0}" "triton==${TRITON:-3.9.0}")
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ ! -f "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ scripts/test_torchtitan.sh -nt "$venv/.installed" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # torch comes first, so that nothing else decides which build of it is installed. torchtitan imports Triton on a CPU.
    "$venv/bin/python" -m pip install -q "${pinned[@]}"
    "$venv/bin/python" -m pip install -q "${pinned[@]}" torchtitan==0.3.0 'pytest>=8.0' 'pytest-timeout>=2.3' -e .
    touch "$venv/.installed"
fi
"$venv/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|torchtitan|triton) '
exec "$venv/bin/python" -m pytest -m "" tests/integrations/test_torchtitan.py "$@"
