"""Many small cases in few starts of processes: their registry, the ranks that run them, and what pytest asks of them.

Reading torch takes a process seconds, and a case takes milliseconds. So all cases for one number of ranks run in one
start, of a process that reads torch and forks the ranks; each rank writes down what became of each case, and a test
looks at one of them. A case makes its own process groups, so that one that fails does not take the others along.
"""

import contextlib
import fcntl
import functools
import importlib.util
import io
import itertools
import json
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import TESTS, run_ranks

FOLDER = TESTS / "distributed" / "ranks"  # of the modules of cases, each of which has a registry called `cases`
RUNNER = FOLDER / "forking_ranks.py"
PATIENCE = 20  # seconds until a collective, or a question to the store, is given up
SHORT = 5  # the same where cases run apart, most of which wait for it
LEFT = 3  # exit status of a rank that leaves in the middle of a case, as the case wants it


class Case(NamedTuple):
    function: Callable[["Ranks"], None]
    sizes: tuple[int, ...]  # numbers of ranks that it runs with


class Cases:
    """A registry: `@cases(2, 3, dtype=[...])` registers a function for each dtype, to run with 2 and 3 ranks.

    Args:
        way: "together", one after the other in the same processes, or "apart", each in processes of its own, which it
            may leave in any state; all of those run at the same time.
    """

    def __init__(self, way="together"):
        self.way = way
        self.by_name: dict[str, Case] = {}

    def __call__(self, *sizes, **choices):
        def register(function):
            for values in itertools.product(*choices.values()):
                arguments = dict(zip(choices, values, strict=True))
                name = "-".join([function.__name__, *map(_shown, values)])
                assert name not in self.by_name or not set(self.by_name[name].sizes) & set(sizes), name
                self.by_name[name] = Case(functools.partial(function, **arguments), sizes)
            return function

        return register


def _shown(value):
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(getattr(value, "__name__", value)).removeprefix("torch.").replace(" ", "_")


def load(module):
    """The registry of a file among the modules of cases."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, FOLDER / f"{module}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module].cases


# ---------------------------------------------------------------------------------------------------------------------
# In a rank


class _Pickler(pickle.Pickler):
    """Tensors in a tenth of the time that torch's own way takes."""

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            content = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            return _tensor, (content, value.dtype, tuple(value.shape))
        return NotImplemented


def _tensor(content, dtype, shape):
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _packed(value):
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.getvalue()


class OtherRankError(Exception):
    """Another rank has failed in the same case, and says more about it."""


class Ranks:
    """What a case knows of the processes it runs in."""

    def __init__(self, place=None, patience=PATIENCE):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.place = place  # path of a file that all ranks know, where cases run apart
        self.patience = patience  # seconds until other ranks are given up
        self.store = dist.distributed_c10d._get_default_store()
        self.gone = False  # whether ranks leave in this case, so that nobody may wait for them at its end
        self.name = ""  # of the case
        self.questions = 0
        self.calls = 0  # of a loss, in this case
        self.groups = []

    def group(self, ranks=None, seconds=PATIENCE):
        """A new process group of these ranks, or of all; what dist.new_group returns on the others."""
        group = dist.new_group(ranks, timeout=timedelta(seconds=seconds))
        self.groups.append(group)
        return group

    def everyones(self, value=None):
        """What every rank says at this point of the case, by rank: no collective, so that no group has to work."""
        self.questions += 1
        keys = [f"{self.name}/{self.questions}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], _packed(value))
        self._wait(keys, self.patience, f"{self.name}/failed")
        return [pickle.loads(said) for said in self.store.multi_get(keys)]

    def _wait(self, keys, seconds, failed=None):
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError):  # that the time is over
                return self.store.wait(keys, timedelta(seconds=1))
            if failed is not None and self.store.check([failed]):
                raise OtherRankError(f"rank {self.store.get(failed).decode()} has failed")
            if time.monotonic() > end:
                missing = [key for key in keys if not self.store.check([key])]
                raise TimeoutError(f"no answer in {seconds} s: {missing}")

    @contextlib.contextmanager
    def short_waits(self, seconds):
        """What init_process_group(timeout=...) sets for the store, here for a while."""
        before = self.store.timeout
        self.store.set_timeout(timedelta(seconds=seconds))
        try:
            yield
        finally:
            self.store.set_timeout(before)

    def _meet(self):
        self.store.set(f"{self.name}/end/{self.rank}", "")
        self._wait([f"{self.name}/end/{rank}" for rank in range(self.size)], 2 * self.patience)

    def run(self, name, function):
        """The traceback of what the case raises here, or None. It returns when all ranks are through."""
        self.name, self.questions, self.calls, self.groups = name, 0, 0, []
        torch.manual_seed(20250522)
        error = None
        try:
            function(self)
        except (Exception, pytest.fail.Exception):
            error = traceback.format_exc()
            self.store.set(f"{name}/failed", str(self.rank))
        if self.place is None:
            self._meet()
            for group in self.groups:
                if isinstance(group, dist.ProcessGroup):
                    dist.destroy_process_group(group)
        elif error is None and not self.gone:
            with contextlib.suppress(TimeoutError):  # its own case fails on the rank that does not come
                self._meet()
        return error


# ---------------------------------------------------------------------------------------------------------------------
# In pytest


def each_case(module):
    """Parametrizes a test with every case of a module, and every number of ranks."""
    chosen = [(size, module, name) for name, case in load(module).by_name.items() for size in case.sizes]
    return pytest.mark.parametrize("rank_case", chosen, ids=[f"{name}-{size} ranks" for size, _, name in chosen])


class Outcomes:
    """What became of the cases. All of them run at once, when the first of pytest's workers asks."""

    def __init__(self, items, folder):
        params = [item.callspec.params for item in items if hasattr(item, "callspec")]
        self.selected = list(dict.fromkeys(found["rank_case"] for found in params if "rank_case" in found))
        self.folder = folder

    def check(self, rank_case):
        """Fail with what the ranks say of a case, unless it went well on all."""
        self._run_all()
        size, module, name = rank_case
        folder = self._folder(size, load(module).way)
        wrong = []
        for rank in range(size):
            lines = map(json.loads, (folder / f"{rank}.jsonl").read_text().splitlines())
            outcome = next((line for line in lines if line["case"] == [module, name]), None)
            if outcome is None:
                wrong.append(f"rank {rank} did not get to the end of it: {(folder / 'said').read_text()}")
            elif outcome["error"] is not None:
                wrong.append(f"rank {rank}: {outcome['error']}")
        if wrong:
            pytest.fail("\n".join([f"{name} with {size} ranks", *wrong]), pytrace=False)

    def _folder(self, size, way):
        return self.folder / f"{size} ranks {way}"

    def _run_all(self):
        done = self.folder / "ranks are done"
        with (self.folder / "ranks are running").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                starts = dict.fromkeys((size, load(module).way) for size, module, _ in self.selected)
                with ThreadPoolExecutor(len(starts)) as pool:  # they wait for each other, and for timeouts
                    list(pool.map(self._run, *zip(*starts, strict=True)))
                done.touch()

    def _run(self, size, way):
        folder = self._folder(size, way)
        folder.mkdir()
        here = [case for case in self.selected if case[0] == size and load(case[1]).way == way]
        (folder / "cases.json").write_text(json.dumps([case[1:] for case in here]))
        for rank in range(size):
            (folder / f"{rank}.jsonl").touch()
        try:
            said = "\n".join(run_ranks(1, RUNNER, folder, way, size))
        except AssertionError as error:
            said = str(error)
        (folder / "said").write_text(said)
