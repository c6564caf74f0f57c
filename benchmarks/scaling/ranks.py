"""One of several processes: runs losses whose vocabulary is split, and prints what it handed to torch.distributed.

python -m benchmarks.scaling.ranks FILE RANK RANKS      what --check-with-gloo starts; FILE is where ranks meet
"""

import functools
import importlib.util
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks.scaling.counter import Collectives, Passes

TOKENS, COLUMNS, HIDDEN_SIZE, CHUNK_SIZE = 24, 10, 8, 7  # COLUMNS of each rank; three chunks and a shorter one
TIMEOUT = timedelta(seconds=60)
LIGER = importlib.util.find_spec("liger_kernel") is not None


def our_calls(rank: int, ranks: int) -> Iterator[tuple[str, dict[str, Any], Callable[[], Tensor]]]:
    """(loss, features of the formula, forward): imported late, so that the collectives are watched by then."""
    from pdl_kernels import pdl_cross_entropy, pdl_linear_cross_entropy

    V = COLUMNS * ranks
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (TOKENS,), generator=generator)
    whole_table = torch.rand(V, generator=generator) + 0.1
    group = dist.group.WORLD

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().requires_grad_()

    for smoothing, sharded in itertools.product((False, True), (False, True)):
        features = {"label_smoothing": smoothing, "sharded_weights": sharded}
        table = whole_table[rank * COLUMNS : (rank + 1) * COLUMNS] if sharded else whole_table
        options = {"label_smoothing": 0.1 * smoothing, "group": group}
        logits = numbers(TOKENS, COLUMNS)
        yield "pdl_cross_entropy", features, functools.partial(pdl_cross_entropy, logits, targets, table, **options)
        for sequence_parallel in (False, True):
            hidden = numbers(TOKENS // ranks if sequence_parallel else TOKENS, HIDDEN_SIZE)
            options = {**options, "sequence_parallel": sequence_parallel, "chunk_size": CHUNK_SIZE}
            arguments = hidden, numbers(COLUMNS, HIDDEN_SIZE), targets, table
            forward = functools.partial(pdl_linear_cross_entropy, *arguments, **options)
            yield "pdl_linear_cross_entropy", {**features, "sequence_parallel": sequence_parallel}, forward


def torch_call(ranks: int) -> tuple[Callable[[], Tensor], int]:
    """torch's cross entropy in loss_parallel, and how many logits a rank has."""
    mesh = init_device_mesh("cpu", (ranks,))
    logits = DTensor.from_local(torch.randn(TOKENS, COLUMNS).bfloat16().requires_grad_(), mesh, [Shard(1)])
    targets = torch.arange(TOKENS) % (COLUMNS * ranks)
    return lambda: F.cross_entropy(logits, targets, reduction="sum"), TOKENS * COLUMNS


def liger_call(ranks: int) -> Callable[[], Tensor]:
    from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction

    logits = torch.randn(TOKENS, 1, COLUMNS, requires_grad=True)
    targets = (torch.arange(TOKENS) % (COLUMNS * ranks)).view(TOKENS, 1)
    return lambda: LigerVocabParallelCEFunction.apply(
        logits, targets, dist.group.WORLD, -100, 0.0, "pytorch", "global"
    ).sum()


def run_rank(watching: Collectives, folder: Path, rank: int, ranks: int) -> None:
    """Write what this rank handed over in every call to <ranks>-<rank>.json."""
    store = f"file://{folder / f'store-{ranks}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    found: list[dict[str, Any]] = []

    def note(loss: str, forward: Callable[[], Tensor], **more: Any) -> None:
        watching.taken()
        result = forward()
        sent_forward = watching.taken()
        result.backward()
        found.append({"loss": loss, "forward": sent_forward, "backward": watching.taken(), **more})

    for loss, features, forward in our_calls(rank, ranks):
        note(loss, forward, features=features)
    if LIGER:
        note("Liger-Kernel", liger_call(ranks))
    forward, logits = torch_call(ranks)
    with loss_parallel(), Passes(logits) as passes:
        result = forward()
        sent_forward, passes.sent = passes.sent, []
        result.backward()
    moved = passes.moved / logits
    found.append({"loss": "torch loss_parallel", "forward": sent_forward, "backward": passes.sent, "moved": moved})
    dist.barrier()  # gloo aborts a rank that leaves while others still talk to it
    dist.destroy_process_group()
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(found))


def main() -> int:
    folder, groups = Path(sys.argv[1]), [int(ranks) for ranks in sys.argv[2:]]
    watching = Collectives()
    importlib.import_module("pdl_kernels")  # only here: it keeps functions of torch.distributed under names of its own
    if LIGER:
        importlib.import_module("liger_kernel.ops")
    fork = multiprocessing.get_context("fork")
    for ranks in groups:
        processes = [fork.Process(target=run_rank, args=(watching, folder, rank, ranks)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode != 0 for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
