"""What the tests share: what they refuse to run on, and which of them run on which device."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def conftest(request):
    """tests/conftest.py as pytest has loaded it: folders have files of that name too."""
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def use(conftest, monkeypatch, interpret, **versions):
    """Pretend that these packages are installed, and TRITON_INTERPRET set so; None: not set."""
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(conftest.importlib.util, "find_spec", versions.get)
    monkeypatch.setattr(conftest.metadata, "version", versions.__getitem__)


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.4.0"), ("3.6.0", "2.10.1"), ("3.5.1", "3.0.0rc1")])
def test_an_old_interpreter_with_a_new_numpy_is_refused(conftest, monkeypatch, triton, numpy):
    use(conftest, monkeypatch, "1", triton=triton, numpy=numpy)
    problem = conftest.interpreter_problem()
    assert f"Triton {triton}'s interpreter" in problem
    assert f"numpy {numpy}: install 'numpy<2.4'" in problem


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.0", "2.4.0"), ("3.10.0", "2.4.0")])
def test_other_versions_work_together(conftest, monkeypatch, triton, numpy):
    use(conftest, monkeypatch, "1", triton=triton, numpy=numpy)
    assert conftest.interpreter_problem() is None


@pytest.mark.parametrize("interpret", [None, "0"])
def test_without_the_interpreter_versions_do_not_matter(conftest, monkeypatch, interpret):
    use(conftest, monkeypatch, interpret, triton="3.6.0", numpy="2.4.0")
    assert conftest.interpreter_problem() is None


def test_without_triton_versions_do_not_matter(conftest, monkeypatch):
    use(conftest, monkeypatch, "1", numpy="2.4.0")
    assert conftest.interpreter_problem() is None


class Item:
    """Stands for a test that pytest has collected."""

    def __init__(self, *markers):
        self.markers = [decorator.mark for decorator in markers]
        self.added = []

    def get_closest_marker(self, name):
        return next((marker for marker in self.markers if marker.name == name), None)

    def add_marker(self, decorator):
        self.added.append((decorator.mark.name, decorator.mark.kwargs["reason"]))


@pytest.mark.parametrize(
    ("on_gpu", "cpu_only", "gpu"),
    [
        (True, [("skip", "only without a GPU: counted in the interpreter")], []),
        (False, [], [("skip", "needs a GPU")]),
    ],
)
def test_marked_tests_are_skipped_on_the_other_device(conftest, monkeypatch, on_gpu, cpu_only, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    items = [Item(pytest.mark.cpu_only(reason="counted in the interpreter")), Item(pytest.mark.gpu), Item()]
    conftest.pytest_collection_modifyitems(items)
    assert [item.added for item in items] == [cpu_only, gpu, []]


def test_a_problem_of_the_interpreter_ends_the_run(conftest, monkeypatch, request):
    monkeypatch.setattr(conftest, "interpreter_problem", lambda: "these two do not work together")
    with pytest.raises(pytest.exit.Exception, match="these two do not work together") as ended:
        conftest.pytest_configure(request.config)
    assert ended.value.returncode == 4
