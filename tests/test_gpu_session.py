"""scripts/gpu_session.sh: rehearsed whole, so that no typo is first met on a GPU; and stages that break."""

import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu_session import paths, prepare
from benchmarks.gpu_session import session as sessions
from benchmarks.gpu_session.session import Session
from benchmarks.gpu_session.stages import LIMIT, STAGES, Stage

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_session.sh"


def inherited(**more):
    """The environment without what this run of pytest has set in it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    own.pop("TRITON_INTERPRET", None)
    return {**own, **more}


def start(*arguments, **options):
    return subprocess.Popen(
        [str(SCRIPT), *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=inherited(PYTHON=sys.executable), **options,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate()
    return process.returncode, output


def test_the_stages_fit_one_call():
    status, output = finish(start("--list"))
    assert status == 0
    assert sum(stage.seconds for stage in STAGES) <= LIMIT == 540
    for stage in STAGES:
        assert f"{stage.seconds} s  {stage.answers}" in output


@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_stage(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("xdist")
    kit = tmp_path / "kit"
    kit.mkdir()
    status, output = finish(start("--rehearse", tmp_path / "out", kit))
    found = json.loads((tmp_path / "out" / "session.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == [stage.name for stage in STAGES]
    assert {stage["name"]: stage["problem"] for stage in found["stages"] if stage["status"] != "passed"} == {}, output
    assert status == 0, output
    assert sum(stage["seconds"] for stage in found["stages"]) < 600
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "results.tar.gz", "session.json", "session.log",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {str(Path(name).parent) for name in names} == {"benchmarks/results/rehearsal"}
    assert {"doctor.json", "doctor-kit.json", "sweep-kit.json", "README.md", "session.json"} <= {
        Path(name).name for name in names
    }
    assert sum(name.endswith(".json") for name in names) >= 7
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Every stage about correctness passed" in text
    assert "48 of 48 cases right" in text
    assert "loss on linear" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT is missing"),
        (["{tmp}/out", "{tmp}/nowhere"], "accepted is a folder"),
        (["{tmp}/file"], "a file; accepted is a folder"),
        (["{tmp}/used"], "holds an earlier session"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "session.json").write_text("{}")
    status, output = finish(start(*(argument.format(tmp=tmp_path) for argument in arguments)))
    assert status == 2
    assert message in output


# ---------------------------------------------------------------------------------------------------------------------
# Stages that break


def stage(name, code, seconds=30, **options):
    """A stage that runs Python code, with facts.json in the place of prepare's."""
    return Stage(name, seconds, f"what {name} says", f'{{python}} -c "{code}"', "{python} -c pass", **options)


PREPARE = stage("prepare", "open('{work}/facts.json', 'w').write('[]'.replace('[]', chr(123) + chr(125)))")


def run_stages(tmp_path, *stages, **options):
    said = []
    tmp_path.mkdir(exist_ok=True)
    session = Session(tmp_path, None, stages, rehearsal=False, seconds=options.pop("seconds", 60), say=said.append)
    session.run()
    return session, {record["name"]: (record["status"], record["problem"]) for record in session.records}, said


def test_after_a_stage_that_fails_hangs_or_crashes_the_others_go_on(tmp_path):
    session, found, said = run_stages(
        tmp_path,
        PREPARE,
        stage("fails", "print('a reason'); raise SystemExit(3)"),
        stage("hangs", "import time; time.sleep(100)", seconds=1),
        stage("crashes", "import os; os.kill(os.getpid(), 11)"),
        stage("writes", "open('{results}/found.json', 'w').write('1')", correctness=True),
        stage("needs", "pass", tool="no-such-tool", correctness=True),
        stage("kit", "pass", kit=True),
    )
    assert found == {
        "prepare": ("passed", None),
        "fails": ("failed", "exit status 3"),
        "hangs": ("failed", "it did not end within 1 s"),
        "crashes": ("failed", "ended by SIGSEGV"),
        "writes": ("passed", None),
        "needs": ("skipped", "no-such-tool is not on the PATH"),
        "kit": ("skipped", "no offline kit with another Triton was given"),
    }
    assert session.passed, "of the stages about correctness all that could run passed"
    assert "    | a reason" in said
    assert "a reason" in (tmp_path / "session.log").read_text()
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "benchmarks/results/unknown/found.json" in archive.getnames()


def test_a_failed_stage_about_correctness_decides(tmp_path):
    session, _, _ = run_stages(tmp_path, PREPARE, stage("wrong", "raise SystemExit(1)", correctness=True))
    assert not session.passed
    assert "Not every stage about correctness passed" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("second", "status"), [("pass", "passed again"), ("raise SystemExit(1)", "failed")])
def test_what_failed_runs_again(tmp_path, second, status):
    again = f'{{python}} -c "{second}"'
    session, found, _ = run_stages(tmp_path, PREPARE, stage("suite", "exit(1)", again=again, correctness=True))
    assert found["suite"][0] == status
    assert session.passed == (status == "passed again")


def test_a_hanging_stage_takes_its_children_along(tmp_path):
    sleeps = "'import time; time.sleep(99)  # {work}'"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeps}])"
    session, found, _ = run_stages(tmp_path, PREPARE, stage("hangs", f"{child}; time.sleep(99)", seconds=2))
    assert found["hangs"][0] == "failed"
    left = subprocess.run(["pgrep", "-f", f"# {session._work}"], capture_output=True, text=True)
    assert left.stdout == ""


def test_a_stage_whose_time_is_over_may_say_what_it_found(tmp_path):
    speaks = """
import time
try:
    time.sleep(99)
except KeyboardInterrupt:
    open('{results}/found.json', 'w').write('1')
    print('last words')
"""
    session, found, said = run_stages(tmp_path, PREPARE, stage("speaks", speaks, seconds=6))
    assert found["speaks"] == ("failed", "it did not end within 6 s")
    assert session.records[1]["seconds"] < 6, "it ended by itself"
    assert "    | last words" in said
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "benchmarks/results/unknown/found.json" in archive.getnames()


def test_a_stage_that_does_not_react_to_its_interruption_is_killed(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)  # {work}"
    session, found, _ = run_stages(tmp_path, PREPARE, stage("deaf", deaf, seconds=6), stage("next", "pass"))
    assert found["deaf"] == ("failed", "it did not end within 6 s")
    assert 6 <= session.records[1]["seconds"] < 6 + sessions.LEAST_SECONDS
    left = subprocess.run(["pgrep", "-f", f"# {session._work}"], capture_output=True, text=True)
    assert left.stdout == ""
    assert found["next"] == ("passed", None)


def test_without_a_gpu_nothing_runs(tmp_path):
    facts = (
        "import json; json.dump(dict(problem='torch sees no GPU'), open('{work}/facts.json', 'w')); raise SystemExit(1)"
    )
    session, found, _ = run_stages(tmp_path, stage("prepare", facts, correctness=True), stage("next", "pass"))
    assert found["next"] == ("not run", "torch sees no GPU")
    assert not session.passed


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path):
    slow = stage("slow", "import time; time.sleep(3)")
    _, found, _ = run_stages(tmp_path, PREPARE, slow, stage("next", "pass"), seconds=sessions.LEAST_SECONDS + 2)
    assert found["slow"] == ("passed", None)
    assert found["next"] == ("not run", "the time of the session was over")


def test_a_full_disk_is_said_and_survived(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions, "replace_file", full)
    _, found, said = run_stages(tmp_path, PREPARE, stage("next", "pass"))
    assert found["next"] == ("passed", None)
    assert any("results.tar.gz cannot be written (No space left on device); going on" in line for line in said)


def test_ctrl_c_keeps_what_was_found(tmp_path):
    process = start("--rehearse", tmp_path / "out", "--only", "doctor", "sanitizer", start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "session.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 130, output
    found = {
        one["name"]: one["status"] for one in json.loads((tmp_path / "out" / "session.json").read_text())["stages"]
    }
    assert found == {"prepare": "passed", "doctor": "failed", "sanitizer": "not run"}


# ---------------------------------------------------------------------------------------------------------------------
# The kit

INSTALL = """
mkdir -p {site}/triton {site}/liger_kernel {site}/liger_kernel-9.8.dist-info
echo '__version__ = "9.9"' > {site}/triton/__init__.py
cp "$1/part" {site}/liger_kernel/__init__.py
"""


@pytest.fixture
def _own_sites(monkeypatch, tmp_path):
    """Kits unpack to folders of this test."""
    for name in ("KIT_SITE", "PEERS_SITE", "CACHE_ROOT"):
        monkeypatch.setattr(paths, name, tmp_path / "machine" / name)
    (tmp_path / "machine").mkdir()


def pack(path, *members):
    """An archive of entries, each given a content."""
    with tarfile.open(path, "w:xz") as archive:
        for entry, content in members:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def make_kit(tmp_path, install=None, **archives):
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "part").write_text("peer = 1")
    if install is not None:
        (kit / "install.sh").write_text(install.format(site=paths.KIT_SITE))
    for version, name in archives.items():
        pack(kit / f"compiled-{version}.tar.xz", (tarfile.TarInfo(name), b"code"))
    return kit


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("_own_sites")
def test_a_kit_is_unpacked_and_its_peers_are_linked(tmp_path):
    kit = make_kit(tmp_path, INSTALL, **{"9.9": "triton-9.9/key/one.cubin", "9.8": "triton-9.8/key/two.cubin"})
    for _ in range(2):
        assert prepare.unpack(kit) == {"kit_triton": "9.9", "kit_cache": True}
        assert files_in(paths.CACHE_ROOT) == {"triton-9.9/key/one.cubin": b"code", "triton-9.8/key/two.cubin": b"code"}
        linked = {path.name: path.readlink() for path in paths.PEERS_SITE.iterdir()}
        assert linked == {name: paths.KIT_SITE / name for name in ("liger_kernel", "liger_kernel-9.8.dist-info")}, (
            "Triton stays out"
        )
        assert files_in(paths.PEERS_SITE / "liger_kernel") == {"__init__.py": b"peer = 1"}


@pytest.mark.usefixtures("_own_sites")
def test_a_kit_may_have_another_tritons_cache_or_no_peer(tmp_path):
    install = "mkdir -p {site}/triton; echo '__version__ = \"9.9\"' > {site}/triton/__init__.py"
    kit = make_kit(tmp_path, install, **{"9.8": "triton-9.8/key/two.cubin"})
    assert prepare.unpack(kit) == {"kit_triton": "9.9", "kit_cache": False}
    assert not paths.PEERS_SITE.exists()


@pytest.mark.usefixtures("_own_sites")
def test_a_kit_may_hold_archives_alone(tmp_path):
    assert prepare.unpack(make_kit(tmp_path, **{"9.9": "triton-9.9/key/one.cubin"})) == {}
    assert files_in(paths.CACHE_ROOT) == {"triton-9.9/key/one.cubin": b"code"}


def link(name, target, kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.usefixtures("_own_sites")
@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("triton-9.9/../../outside"),
        link("triton-9.9", "/etc"),
        link("triton-9.9", "../../elsewhere"),
        link("passwords", "../../elsewhere", tarfile.LNKTYPE),
    ],
    ids=["above", "above from below", "link to the root", "link above", "hard link above"],
)
def test_members_that_leave_the_folder_are_refused(tmp_path, member):
    kit = make_kit(tmp_path)
    pack(kit / "compiled-9.9.tar.xz", (member, b""))
    with pytest.raises(tarfile.FilterError):
        prepare.unpack(kit)
    assert list((tmp_path / "machine").rglob("*")) == [paths.CACHE_ROOT], "nothing was written"


def no_kit(tmp_path):
    return tmp_path / "nowhere"


def kit_whose_installation_fails(tmp_path):
    return make_kit(tmp_path, "exit 3")


def kit_with_another_file(tmp_path):
    kit = make_kit(tmp_path)
    (kit / "compiled-9.9.tar.xz").write_text("404: not found")
    return kit


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (no_kit, "the kit {tmp}/nowhere is not a folder"),
        (kit_whose_installation_fails, "returned non-zero exit status 3"),
        (kit_with_another_file, "file could not be opened successfully"),
    ],
)
def test_a_kit_that_cannot_be_unpacked_is_a_fact(tmp_path, make, problem):
    facts = tmp_path / "facts.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session.prepare", "--rehearsal", str(facts), str(make(tmp_path))],
        capture_output=True, text=True, cwd=ROOT, env=inherited(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(facts.read_text())
    problem = problem.format(tmp=tmp_path)
    assert problem in found["kit_problem"]
    assert f"the kit could not be unpacked: {found['kit_problem']}" in done.stdout
    assert found["problem"] is None, "the other stages run"


def first_half(packed):
    return packed[: len(packed) // 2]


def changed_in_the_middle(packed):
    middle = len(packed) // 2
    return packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :]


@pytest.mark.usefixtures("_own_sites")
@pytest.mark.parametrize("spoil", [first_half, changed_in_the_middle])
@pytest.mark.xfail(strict=True, raises=(EOFError, lzma.LZMAError), reason="prepare.main() does not expect these errors")
def test_a_damaged_archive_is_a_fact(tmp_path, monkeypatch, spoil):
    kit = make_kit(tmp_path)
    pack(kit / "whole", (tarfile.TarInfo("triton-9.9/key/one.cubin"), os.urandom(100_000)))
    (kit / "compiled-9.9.tar.xz").write_bytes(spoil((kit / "whole").read_bytes()))
    monkeypatch.setattr(prepare, "gpu_facts", lambda: {"problem": None})
    monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path / "facts.json"), str(kit)])
    assert prepare.main() == 1
    assert json.loads((tmp_path / "facts.json").read_text())["kit_problem"]


# ---------------------------------------------------------------------------------------------------------------------
# The journal of a test run

FOUR_TESTS = """
import time
from pathlib import Path

import pytest


def test_passes():
    pass


def test_fails():
    assert 1 + 1 == 3


@pytest.fixture
def broken():
    raise OSError("no such thing")


def test_breaks(broken):
    pass


@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""
FOUR_LINES = [
    ("test_four.py::test_breaks", "failed"),
    ("test_four.py::test_fails", "failed"),
    ("test_four.py::test_passes", "passed"),
    ("test_four.py::test_skipped", "skipped"),
]
HANGS = """

def test_hangs():
    Path("begun").touch()
    time.sleep(100)
"""
PRINTED = (
    "failed: test_four.py::test_fails, call\n", "assert (1 + 1) == 3",
    "failed: test_four.py::test_breaks, setup\n", "OSError: no such thing",
)  # fmt: skip


def start_journaled(folder, tests, *arguments):
    """pytest on these tests, which writes journal.jsonl and output.txt."""
    (folder / "test_four.py").write_text(tests)
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_session.pytest_journal",
             "--journal", "journal.jsonl", *arguments, "test_four.py"],
            stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=inherited(PYTHONPATH=str(ROOT)),
            start_new_session=True,
        )  # fmt: skip


def journal_of(folder):
    """Names and outcomes, sorted: processes of xdist end their tests in any order."""
    path = folder / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(line.keys() == {"name", "outcome", "seconds"} for line in lines)
    return sorted((line["name"], line["outcome"]) for line in lines)


def in_how_many_processes(number):
    if number == "2":
        pytest.importorskip("xdist")
    return ("-n", number) if number != "1" else ()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_journal_has_a_line_for_each_test(tmp_path, processes):
    process = start_journaled(tmp_path, FOUR_TESTS, *in_how_many_processes(processes))
    assert process.wait(120) == 1
    assert journal_of(tmp_path) == FOUR_LINES
    output = (tmp_path / "output.txt").read_text()
    for text in PRINTED:
        assert text in output
    assert max(map(output.index, PRINTED)) < output.index("= FAILURES ="), "at once"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_that_is_killed_leaves_what_ended_before(tmp_path, processes):
    process = start_journaled(tmp_path, FOUR_TESTS + HANGS, *in_how_many_processes(processes))
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "begun").exists() and len(journal_of(tmp_path)) == 4) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert journal_of(tmp_path) == FOUR_LINES
    output = (tmp_path / "output.txt").read_text()
    for text in PRINTED:
        assert text in output
