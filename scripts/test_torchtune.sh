#!/usr/bin/env bash
# Runs the test of the recipe for torchtune 0.6.1 in docs/recipes.md, in an environment of its own: torchtune imports
# what torchao 0.9.0 has and later ones do not. Arguments go to pytest. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv-torchtune}
pinned=(torch==2.13.0 triton==3.9.0)
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ ! -f "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ scripts/test_torchtune.sh -nt "$venv/.installed" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q "${pinned[@]}"  # first, so that nothing else decides which build is installed
    "$venv/bin/python" -m pip install -q "${pinned[@]}" torchtune==0.6.1 torchao==0.9.0 \
        'pytest>=8.0' 'pytest-timeout>=2.3' -e .
    touch "$venv/.installed"
fi
"$venv/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|torchao|torchtune) '
exec "$venv/bin/python" -m pytest -m "" tests/integrations/test_torchtune.py "$@"
