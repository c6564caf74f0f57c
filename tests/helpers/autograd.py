"""What the tests of one operation's gradient share: sizes, a tensor that a model made, and a comparison."""

import torch

N, V = 3, 37


def assert_gradient(got, expected):
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-7)


def producer(logits):
    """(leaf, non-leaf with the same values): what a model's output is to its parameters."""
    leaf = logits.clone().requires_grad_()
    return leaf, leaf * 1
