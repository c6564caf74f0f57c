#!/usr/bin/env bash
# Runs the loss under NVIDIA's compute-sanitizer: out-of-bounds accesses (memcheck), then shared-memory races (racecheck).
# Needs a GPU and compute-sanitizer on the PATH. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH (it is part of the CUDA toolkit)" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" - <<'P'
import torch

from pdl_kernels import pdl_cross_entropy

# Whole rows and slices, aligned and unaligned rows, every option, targets that are no class.
for rows, vocab_size in ((3, 1), (3, 127), (600, 1000), (4, 50257), (300, 32000), (40, 128256), (200, 50257)):
    for options in (
        {},
        {"reduction": "none"},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5, "return_stats": True},
    ):
        logits = torch.randn(rows, vocab_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(vocab_size, (rows,), device="cuda")
        targets[0], targets[1] = -100, vocab_size
        result = pdl_cross_entropy(logits, targets, torch.rand(vocab_size, device="cuda"), **options)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward(torch.full_like(loss, 0.25))
        torch.cuda.synchronize()
print("done")
P
done
