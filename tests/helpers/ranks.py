"""Several gloo processes on a CPU, started as torchrun starts them."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]


def free_port():
    """Below those that the system hands out by itself, gloo's own among them: nobody takes it before rank 0 does."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("no port is free")


def leave():
    """Called at the end of a rank: one that goes while others still talk to it is aborted by gloo, now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(number, script, *arguments, timeout=240):
    """Run a Python file in `number` processes and wait for them; an error shows what the ranks said."""
    port = free_port()
    common = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        said = [process.communicate()[0] for process in processes]
        raise AssertionError(
            "\n".join(f"rank {rank} hung:\n{text[-3000:]}" for rank, text in enumerate(said))
        ) from None
    codes = [process.returncode for process in processes]
    assert codes == [0] * number, "\n".join(f"rank {rank}:\n{text[-3000:]}" for rank, text in enumerate(said))
    return said
