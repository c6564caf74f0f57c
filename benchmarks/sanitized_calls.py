"""Calls for compute-sanitizer, which runs them a hundred times slower: few, small, and of every kind.

compute-sanitizer --tool memcheck python -m benchmarks.sanitized_calls [--quick] [--device cpu]

A profiler takes one shape of them, or any other: --shape ROWS VOCABULARY.
"""

import argparse

import torch

from pdl_kernels import pdl_cross_entropy

# Whole rows and slices, aligned and unaligned rows.
QUICK_SHAPES = ((3, 127), (600, 1000), (3, 32000))
SHAPES = ((3, 1), *QUICK_SHAPES, (4, 50257), (300, 32000), (40, 128256), (200, 50257))
EVERY_OPTION = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5, "return_stats": True}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sanitized_calls", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest shapes alone")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("ROWS", "VOCABULARY"), help="this one alone")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    chosen = parser.parse_args()
    backend = "triton" if chosen.device == "cuda" else "auto"
    shapes = [tuple(chosen.shape)] if chosen.shape else QUICK_SHAPES if chosen.quick else SHAPES
    for rows, vocab_size in shapes:
        for options in ({}, {"reduction": "none"}, EVERY_OPTION):
            logits = torch.randn(rows, vocab_size, device=chosen.device, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.randint(vocab_size, (rows,), device=chosen.device)
            targets[0] = -100
            if chosen.device == "cuda":
                targets[1] = vocab_size  # no class: the guarded gathers
            weights = torch.rand(vocab_size, device=chosen.device)
            result = pdl_cross_entropy(logits, targets, weights, backend=backend, **options)
            loss = result[0] if isinstance(result, tuple) else result
            loss.backward(torch.full_like(loss, 0.25))
            if chosen.device == "cuda":
                torch.cuda.synchronize()
        print(f"done: {rows} x {vocab_size}", flush=True)


if __name__ == "__main__":
    main()
