"""Times losses over a vocabulary that is split over processes: on several GPUs, or, small, with gloo on a CPU.

    torchrun --nproc-per-node 2 -m benchmarks.scaling.measure [--tokens N] [--vocab V] [--json FILE]

Forward and backward of every way in turn, all processes at once, `--rounds` times; the slowest process decides. What a
way would send and move by computation says `python -m benchmarks.scaling`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks.environment import describe
from benchmarks.results import write_record
from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256, help="a multiple of the number of processes")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write a record, by the first process")
    chosen = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 -m benchmarks.scaling.measure")
    world = int(os.environ["WORLD_SIZE"])
    if chosen.vocab % world:
        parser.error(f"--vocab is {chosen.vocab}; accepted are multiples of {world}, the number of processes")
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    found = measure(chosen.tokens, chosen.vocab, chosen.hidden_size, chosen.rounds, device)
    if dist.get_rank() == 0:
        for name, record in found.items():
            megabytes = "" if record["extra_bytes"] is None else f", {record['extra_bytes'] / 1e6:9.1f} MB"
            print(f"{name:42} {statistics.median(record['seconds']) * 1e3:9.3f} ms{megabytes}")
        if chosen.json:
            options = {name: value for name, value in vars(chosen).items() if name != "json"}
            record = {"ranks": world, **options, "environment": describe(device, []), "ways": found}
            write_record(chosen.json, record)
    dist.barrier()
    dist.destroy_process_group()


def measure(tokens: int, vocab: int, hidden_size: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each round, and bytes above what was there before, of the slowest or fullest process."""
    ways = make_ways(tokens, vocab, hidden_size, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    extra: dict[str, float] = {}
    for turn in range(WARM_UP + rounds):
        for name, way in ways.items():
            took, peak = one_turn(way, device)
            if turn >= WARM_UP:
                seconds[name].append(took)
                extra[name] = peak
    return {
        name: {"seconds": seconds[name], "extra_bytes": extra[name] if device.type == "cuda" else None} for name in ways
    }


def one_turn(way: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, bytes) of the slowest and of the fullest process."""
    before = 0
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    way()
    peak = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    both = torch.tensor([time.perf_counter() - start, peak], dtype=torch.float64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    took, most = both.tolist()
    return took, most


def make_ways(tokens: int, vocab: int, hidden_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    group, mesh = dist.group.WORLD, init_device_mesh(device.type, (world,))
    generator = torch.Generator(device).manual_seed(0)
    targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
    weights = torch.rand(vocab, device=device, generator=generator) + 0.1
    generator.manual_seed(1 + rank)
    columns = vocab // world

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    logits = numbers(tokens, columns).requires_grad_()
    # The body is frozen here: its gradient would be summed over the processes in either way.
    hidden, head = numbers(tokens, hidden_size), numbers(columns, hidden_size).requires_grad_()

    def ours(**options: Any) -> Callable[[], object]:
        def run() -> None:
            given = logits * 1 if options.get("inplace") else logits
            loss = pdl_cross_entropy(given, targets, weights, group=group, **options)
            torch.autograd.grad(loss, logits)

        return run

    def copy() -> None:
        torch.autograd.grad((logits * 1).sum(), logits)

    def projected() -> None:
        loss = pdl_cross_entropy(hidden @ head.T, targets, weights, group=group, inplace=True)
        torch.autograd.grad(loss, head)

    def fused() -> None:
        torch.autograd.grad(pdl_linear_cross_entropy(hidden, head, targets, weights, group=group), head)

    return {
        "pdl_cross_entropy": ours(),
        "pdl_cross_entropy, in place, and a copy": ours(inplace=True),
        "a copy and its backward alone": copy,
        "torch loss_parallel (no weights)": lambda: torch_parallel(logits, targets, mesh),
        "gathered logits, pdl_cross_entropy": lambda: gathered(logits, targets, weights, world),
        "projection and pdl_cross_entropy": projected,
        "pdl_linear_cross_entropy": fused,
    }


def torch_parallel(logits: Tensor, targets: Tensor, mesh: DeviceMesh) -> None:
    with loss_parallel():
        whole = DTensor.from_local(logits.detach(), mesh, [Shard(1)]).requires_grad_()
        F.cross_entropy(whole, targets).backward()


def gathered(logits: Tensor, targets: Tensor, weights: Tensor, world: int) -> None:
    parts = [torch.empty_like(logits) for _ in range(world)]
    dist.all_gather(parts, logits.detach())
    whole = torch.cat(parts, 1).requires_grad_()
    torch.autograd.grad(pdl_cross_entropy(whole * 1, targets, weights, inplace=True), whole)


if __name__ == "__main__":
    main()
