"""What a session on a GPU unpacks from its kit, and kits that are damaged."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import inherited

from benchmarks.gpu_session import paths, prepare

ROOT = Path(__file__).resolve().parents[2]
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
def test_a_damaged_archive_is_a_fact(tmp_path, monkeypatch, spoil):
    kit = make_kit(tmp_path)
    pack(kit / "whole", (tarfile.TarInfo("triton-9.9/key/one.cubin"), os.urandom(100_000)))
    (kit / "compiled-9.9.tar.xz").write_bytes(spoil((kit / "whole").read_bytes()))
    monkeypatch.setattr(prepare, "gpu_facts", lambda: {"problem": None})
    monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path / "facts.json"), str(kit)])
    assert prepare.main() == 1
    assert json.loads((tmp_path / "facts.json").read_text())["kit_problem"]
    assert not list(paths.CACHE_ROOT.rglob("*")), "nothing of it is taken for a whole cache"
