#!/usr/bin/env bash
# Runs the tests with the oldest supported software, in an environment of its own: Python 3.12, torch 2.11.0, which brings
# Triton 3.6.0, and numpy < 2.4, with which that Triton's interpreter works. Arguments go to pytest. Set PYTHON to choose
# another interpreter. torch 2.11.0 for Linux is a CUDA build of some gigabytes; it needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
if ! "$python" --version >/dev/null 2>&1; then  # it may be there and not work: a shim of pyenv
    echo "scripts/test_oldest.sh: $python does not run; install Python 3.12, or set PYTHON" >&2
    exit 2
fi
venv=${VENV:-.venv-oldest}
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ ! -f "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ scripts/test_oldest.sh -nt "$venv/.installed" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q torch==2.11.0 triton==3.6.0 'numpy<2.4'
    "$venv/bin/python" -m pip install -q torch==2.11.0 triton==3.6.0 'numpy<2.4' -e '.[test,training,cli,benchmark]'
    touch "$venv/.installed"
fi
"$venv/bin/python" -c 'import numpy, torch, triton; print("torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)'
exec "$venv/bin/python" -m pytest -n 2 --dist loadscope "$@"
