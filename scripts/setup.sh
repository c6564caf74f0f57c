#!/usr/bin/env bash
# Makes .venv with the package and the extras named as arguments; does nothing when it is up to date.
#
#   scripts/setup.sh test training
#
# torch comes first, so that nothing else decides which build of it is installed. A CUDA or ROCm torch that the system
# already has is used, with the Triton it pins. Training frameworks come in the versions of tests/integrations/pinned.txt,
# or, with PINS=/dev/null, in the newest that fit; the packages that benchmarks.quality reads as data, in those of
# benchmarks/quality/pinned.txt. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0        # the version that CPU environments are tested with
PINS=${PINS:-tests/integrations/pinned.txt}
CPU_TRITON=3.9.0    # a CPU torch brings no Triton; the interpreter and ahead-of-time compilation need one
extras=$(IFS=,; echo "$*")
constraints=("$PINS")
case ",$extras," in *,quality,*) constraints+=(benchmarks/quality/pinned.txt) ;; esac

stamp="$VENV/.installed-$(echo "$extras" | tr ',' '-')"
newer() { for file in pyproject.toml scripts/setup.sh "${constraints[@]}"; do [ "$stamp" -nt "$file" ] || return 1; done; }
if [ -f "$stamp" ] && newer; then exit 0; fi

accelerated() { "$1" -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))' 2>/dev/null; }

if [ ! -x "$VENV/bin/python" ]; then
    if accelerated "$PYTHON"; then
        "$PYTHON" -m venv --system-site-packages "$VENV"
    else
        "$PYTHON" -m venv "$VENV"
    fi
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
python="$VENV/bin/python"
"$python" -c 'import torch' 2>/dev/null || "$python" -m pip install -q "torch==$TORCH"
if [ "$(uname -s)" = Linux ] && ! accelerated "$python"; then
    "$python" -m pip install -q "triton==$CPU_TRITON"
fi
"$python" -m pip install -q "${constraints[@]/#/-c}" -e ".[$extras]"
touch "$stamp"
"$python" - <<'P'
import torch
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"environment ready: torch {torch.__version__} on {device}")
P
