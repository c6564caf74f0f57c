"""Vocabulary-parallel losses on paper: what each scheme moves, sends and keeps, and how long that would take.

    python -m benchmarks.scaling [--tokens N] [--json FILE] [--plot FILE.png]

Nothing here runs on a GPU. `python -m benchmarks.scaling --check-with-gloo` holds what the formulas say is sent against
what processes really hand to torch.distributed.
"""
