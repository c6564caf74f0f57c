#!/usr/bin/env bash
# From the demo's corpus to weights on the command line: count, weigh, inspect, plot. Writes to results/weights.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
out=results/weights
tokenizer=$("$bin/python" -c 'import sys; sys.path.insert(0, "examples"); from smollm2 import find_model_file; print(find_model_file())')

"$bin/python" examples/docstring_corpus.py "$out/docstrings.jsonl"
set -x
"$bin/pdl-kernels" count "$out/docstrings.jsonl" --tokenizer "$tokenizer" --append-eos --output "$out/counts.safetensors" --overwrite
"$bin/pdl-kernels" weights "$out/counts.safetensors" --output "$out/weights.safetensors" --overwrite
"$bin/pdl-kernels" inspect "$out/weights.safetensors" "$out/counts.safetensors" --tokenizer "$tokenizer"
"$bin/pdl-kernels" plot "$out/weights.safetensors" "$out/counts.safetensors" --output "$out/weights.png" --overwrite
