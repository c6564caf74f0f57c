#!/usr/bin/env bash
# Runs the tests of the training frameworks in an environment of its own, with the pinned versions, or with the newest:
#
#   scripts/test_trainers.sh [pinned|newest] [arguments of pytest]
#
# torchtitan, which wants an older `datasets`, has another environment: see test_torchtitan.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-pinned}
shift || true
pins=tests/integrations/pinned.txt
export VENV=.venv-trainers
case "$which" in
    pinned)
        if [ -d "$VENV" ] && [ "$pins" -nt "$VENV/pins" ]; then rm -f "$VENV"/.installed-*; fi
        PIP_CONSTRAINT=$PWD/$pins scripts/setup.sh test training trl lightning trainers
        touch "$VENV/pins"
        ;;
    newest)
        VENV=.venv-trainers-newest
        rm -f "$VENV"/.installed-*
        if [ -x "$VENV/bin/python" ]; then
            "$VENV/bin/python" -m pip install -q -U accelerate datasets lightning peft transformers trl
        fi
        scripts/setup.sh test training trl lightning trainers
        ;;
    *)
        echo "scripts/test_trainers.sh: $which is given; accepted are pinned and newest" >&2
        exit 2
        ;;
esac
"$VENV/bin/python" -m pip list 2>/dev/null | grep -E '^(accelerate|datasets|lightning|peft|torch|transformers|trl) '
exec "$VENV/bin/python" -m pytest -n 2 --dist loadscope -m "" tests/integrations tests/examples/test_finetune_*.py \
    tests/examples/test_train_plain_loop.py "$@"
