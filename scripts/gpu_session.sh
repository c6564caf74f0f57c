#!/usr/bin/env bash
# The first nine minutes on a GPU, in order of value: docs/gpu.md.
#
#   scripts/gpu_session.sh OUT [KIT]         OUT takes what is found; KIT is a folder of shared/tools/offline-kit's kind
#   scripts/gpu_session.sh --list            stages, seconds, and what each answers
#   scripts/gpu_session.sh --rehearse OUT    every stage, small, on a CPU
#
# Nothing has to be installed but torch, Triton and pytest. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=$PWD exec "${PYTHON:-python3}" -m benchmarks.gpu_session "$@"
