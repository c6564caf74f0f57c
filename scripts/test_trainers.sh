#!/usr/bin/env bash
# Runs the tests of the training frameworks with the pinned versions, or, in an environment of their own, with the oldest
# that they pass with or the newest there are:
#
#   scripts/test_trainers.sh [pinned|oldest|newest] [arguments of pytest]
#
# torchtitan, which wants an older `datasets`, has another environment: see test_torchtitan.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-pinned}
shift || true
extras=(test training cli dev)  # those of `make test`
export VENV=${VENV:-.venv}
case "$which" in
    pinned)
        scripts/setup.sh "${extras[@]}"
        ;;
    oldest)
        VENV=.venv-trainers-oldest
        extras=(test training)
        PINS=tests/integrations/oldest.txt scripts/setup.sh "${extras[@]}"
        ;;
    newest)
        VENV=.venv-trainers-newest
        extras=(test training)
        PINS=/dev/null scripts/setup.sh "${extras[@]}"
        "$VENV/bin/python" -m pip install -q -U accelerate datasets lightning peft transformers trl
        ;;
    *)
        echo "scripts/test_trainers.sh: $which is given; accepted are pinned, oldest and newest" >&2
        exit 2
        ;;
esac
"$VENV/bin/python" -m pip list 2>/dev/null | grep -E '^(accelerate|datasets|lightning|peft|torch|transformers|trl) '
exec "$VENV/bin/python" -m pytest -n 2 --dist loadscope -m "" tests/integrations tests/examples/test_finetune_*.py \
    tests/examples/test_train_plain_loop.py "$@"
