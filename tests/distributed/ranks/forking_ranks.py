"""Starts the ranks that run cases, as forks of this process, which has read all modules: see helpers/rank_cases.py.

Each fork finds what torchrun would tell it in its environment.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels

import torch.distributed as dist
from helpers import rank_cases
from helpers.ranks import free_port, leave


def run_together(folder, chosen, rank):
    """In a rank: all cases, one after the other, and a line for each."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=rank_cases.PATIENCE))
    ranks = rank_cases.Ranks()
    with (folder / f"{rank}.jsonl").open("w") as lines:
        for module, name in chosen:
            begin = time.process_time()
            error = ranks.run(f"{module}/{name}", rank_cases.load(module).by_name[name].function)
            seconds = round(time.process_time() - begin, 3)
            print(json.dumps({"case": [module, name], "error": error, "seconds": seconds}), file=lines, flush=True)
    leave()


def run_apart(place, module, name, outcome):
    """In a fork for one case and one rank: its traceback, or null."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Timeouts are short only when all are there: so many processes at once take their time to start.
    where = f"file://{place}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    short = timedelta(seconds=rank_cases.SHORT)
    dist.distributed_c10d._set_pg_timeout(short, dist.group.WORLD)
    dist.distributed_c10d._get_default_store().set_timeout(short)
    ranks = rank_cases.Ranks(place, 2 * rank_cases.SHORT)
    outcome.write_text(json.dumps(ranks.run(name, rank_cases.load(module).by_name[name].function)))


def fork(rank, said, function, *arguments):
    """The number of a process that calls the function, with what it prints in a file, and ends."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        function(*arguments)
        status = 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pids, seconds):
    """{pid: exit status} of all of them; those that are still there after so many seconds are killed."""
    found, end = {}, time.monotonic() + seconds
    while len(found) < len(pids):
        late = time.monotonic() > end
        for pid in set(pids) - set(found):
            if late:
                os.kill(pid, signal.SIGKILL)
            over, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if over:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return found


def together(folder, chosen, size):
    said = [folder / f"{rank}.said" for rank in range(size)]
    pids = [fork(rank, said[rank], run_together, folder, chosen, rank) for rank in range(size)]
    statuses = ended(pids, 200)
    for rank, pid in enumerate(pids):
        print(f"rank {rank} ended with {statuses[pid]} and said:\n{said[rank].read_text()[-3000:]}")


def apart(folder, chosen, size):
    """All cases at the same time, as most of them wait."""
    files = {
        (rank, number): (folder / f"{rank}.{number}.said", folder / f"{rank}.{number}.json")
        for number in range(len(chosen))
        for rank in range(size)
    }
    pids = {
        (rank, number): fork(rank, said, run_apart, folder / f"store {number}", *chosen[number], outcome)
        for (rank, number), (said, outcome) in files.items()
    }
    statuses = ended(list(pids.values()), 60)
    for rank in range(size):
        with (folder / f"{rank}.jsonl").open("w") as lines:
            for number, case in enumerate(chosen):
                said, outcome = files[rank, number]
                status = statuses[pids[rank, number]]
                error = f"the process ended with {status} and said:\n{said.read_text()[-3000:]}"
                if status == rank_cases.LEFT:
                    error = None
                with contextlib.suppress(FileNotFoundError):
                    error = json.loads(outcome.read_text())
                print(json.dumps({"case": case, "error": error, "seconds": 0}), file=lines)


if __name__ == "__main__":
    folder, way, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    chosen = json.loads((folder / "cases.json").read_text())
    for module in ("torch._dynamo", "torch.distributed.tensor"):  # some cases need them, which take seconds to read
        importlib.import_module(module)
    for module in {module for module, _ in chosen}:
        rank_cases.load(module)
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_PORT=str(free_port()))
    {"together": together, "apart": apart}[way](folder, chosen, size)
