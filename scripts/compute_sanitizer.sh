#!/usr/bin/env bash
# Runs the loss under NVIDIA's compute-sanitizer: out-of-bounds accesses (memcheck), then shared-memory races (racecheck).
# Needs a GPU and compute-sanitizer on the PATH. Arguments go to benchmarks.sanitized_calls. Set PYTHON to choose the
# interpreter, TOOLS to choose the tools.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH (it is part of the CUDA toolkit)" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
for tool in ${TOOLS:-memcheck racecheck}; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" -m benchmarks.sanitized_calls "$@"
done
