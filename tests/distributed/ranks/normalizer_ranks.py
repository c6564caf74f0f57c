"""One of three processes that share a step: unequal numbers of micro-batches, of tokens, and of counted ones."""

import torch
import torch.distributed as dist
from helpers.ranks import leave

from pdl_kernels import global_normalizer, pdl_cross_entropy
from reference.pdl import reference_cross_entropy

V = 11
CUTS = ([(0, 3), (3, 4), (4, 9)], [(9, 20)], [])  # of each rank

if __name__ == "__main__":
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, V, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, (20,), generator=generator)
    targets[4:9] = -100
    weights, u = torch.rand(V, generator=generator) + 0.1, torch.randn(20, generator=generator)
    mine = [slice(*cut) for cut in CUTS[dist.get_rank()]]

    assert global_normalizer([targets[cut] for cut in mine]) == 15
    n = global_normalizer(
        [targets[cut] for cut in mine], weights=weights, token_weights=[u[cut] for cut in mine], group=dist.group.WORLD
    )
    gradient, total = torch.zeros_like(logits), torch.zeros((), dtype=torch.float64)
    for cut in mine:
        part = logits[cut].clone().requires_grad_()
        loss = pdl_cross_entropy(part, targets[cut], weights, token_weights=u[cut], normalizer=n)
        loss.backward()
        gradient[cut] = part.grad
        total += loss.detach()
    dist.all_reduce(gradient), dist.all_reduce(total)

    whole = logits.clone().requires_grad_()
    expected, _ = reference_cross_entropy(whole, targets, weights, token_weights=u)
    expected.backward()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-15)
    print("as one big batch")
    leave()
