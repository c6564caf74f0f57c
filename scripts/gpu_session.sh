#!/usr/bin/env bash
# The first nine minutes on a GPU, in order of value: docs/gpu.md.
#
#   scripts/gpu_session.sh OUT [KIT]         OUT takes what is found; KIT is a folder with install.sh
#   scripts/gpu_session.sh --list            stages, seconds, and what each answers
#   scripts/gpu_session.sh --rehearse OUT    every stage, small, on a CPU
#
# It needs torch, Triton, numpy, safetensors, tqdm, rich, typer, psutil, matplotlib and pytest with xdist and timeout, and
# installs nothing. PYTHON chooses the interpreter: .venv's where there is one, python3 otherwise.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -n "${PYTHON:-}" ] || { PYTHON=python3; [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python; }
PYTHONPATH=$root exec "$PYTHON" -m benchmarks.gpu_session "$@"
