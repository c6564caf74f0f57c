"""What the tests of the quality benchmark share; the stand-ins are in tests/helpers/quality.py."""

import contextlib
import errno
import os

import pytest
import torch


@contextlib.contextmanager
def one_thread():
    """Tiny models gain nothing from several, and beside other work they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def _transformers_speaks():
    """Loading a model silences transformers, which other tests may listen to."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def _scores():
    """Skips where texts cannot be scored."""
    for package in ("sacrebleu", "rouge_score"):
        pytest.importorskip(package, reason=f"{package}, which scores texts, is not installed (the extra `quality`)")


@pytest.fixture
def make_experiment(tmp_path, monkeypatch, _scores):
    """A function that makes one as a new start of the program does; folders are those of the test."""
    from helpers.quality import TINY, make_chat_model, make_task, use_task

    from benchmarks.quality import matrix
    from benchmarks.quality.cache import Cache
    from benchmarks.quality.matrix import Experiment

    monkeypatch.setattr(matrix, "FURTHER_RATES", 0)  # the search that goes on has tests of its own
    monkeypatch.setenv("PDL_KERNELS_COMMIT", "tests")  # git is not asked
    use_task(monkeypatch, make_task())

    def make(out="out", cache="cache", settings=TINY):
        return Experiment(make_chat_model(), settings, Cache(tmp_path / cache, settings), tmp_path / out)

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory, _scores):
    """{run: the experiment after it} of cross entropy, PDL and the untouched model, which nothing interrupted."""
    from helpers.quality import CROSS_ENTROPY, PDL, TINY, UNTOUCHED, make_chat_model, make_task, use_task

    from benchmarks.quality import matrix
    from benchmarks.quality.cache import Cache
    from benchmarks.quality.matrix import Experiment, run_all

    folder, found = tmp_path_factory.mktemp("finished"), {}
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(matrix, "FURTHER_RATES", 0)
        patch.setenv("PDL_KERNELS_COMMIT", "tests")
        use_task(patch, make_task())
        for run in (CROSS_ENTROPY, PDL, UNTOUCHED):
            found[run] = Experiment(make_chat_model(), TINY, Cache(folder / "cache", TINY), folder / "out")
            run_all(found[run], [run])
    return found


@pytest.fixture
def count_calls(monkeypatch):
    """A function that counts the calls of `matrix.<name>`, and lets the call of one number fail."""
    from benchmarks.quality import matrix

    def count(name, failing=None, error=KeyboardInterrupt):
        calls, function = [], getattr(matrix, name)

        def counted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == failing:
                raise error
            return function(*arguments, **options)

        monkeypatch.setattr(matrix, name, counted)
        return calls

    return count


@pytest.fixture
def set_disk_full(monkeypatch):
    """A function that decides whether there is space left on the device; without, no file gets its final name."""
    replace = os.replace

    def fail(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def set_full(full):
        monkeypatch.setattr(os, "replace", fail if full else replace)

    return set_full
