"""What is installed, what it imports, and which versions it refuses."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pdl_kernels import backends

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_contains_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("build")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pdl_kernels"}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "pdl_kernels").rglob("*") if p.suffix in (".py", ".typed")}
    assert {name for name in names if name.startswith("pdl_kernels/")} == expected
    assert any(name.endswith("LICENSE") for name in names)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; "


@pytest.mark.lesson("import without Triton")
def test_import_and_use_without_triton():
    done = run(
        WITHOUT_TRITON + "import torch; from pdl_kernels import pdl_cross_entropy; "
        "x = torch.randn(3, 5, requires_grad=True); pdl_cross_entropy(x, torch.tensor([0, 1, 2])).backward(); "
        "print('finite', bool(x.grad.isfinite().all()))"
    )
    assert done.stdout.strip() == "finite True", done.stderr


def test_import_does_not_load_triton():
    done = run("import sys, pdl_kernels; print('pdl_kernels.kernels' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_triton_backend_without_triton_says_so():
    done = run(
        WITHOUT_TRITON + "import torch; from pdl_kernels import pdl_cross_entropy; "
        "pdl_cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), backend='triton')",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 1
    assert "backend='triton' cannot run: Triton cannot be imported" in done.stderr


def test_old_triton_is_refused():
    done = run(
        "import torch, triton; triton.__version__ = '3.5.1'; from pdl_kernels import pdl_cross_entropy; "
        "pdl_cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), backend='triton')",
        TRITON_INTERPRET="1",
    )
    assert "Triton 3.5.1 is installed, and Triton >= 3.6 is needed" in done.stderr


def test_old_torch_is_refused():
    done = run("import torch; torch.__version__ = '2.10.0'; import pdl_kernels")
    assert done.returncode == 1
    assert "pdl_kernels needs torch >= 2.11, and torch 2.10.0 is installed" in done.stderr


def test_versions_are_said_in_one_place():
    requirements = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={backends.dotted(backends.MINIMUM_TORCH)}"' in requirements
    assert f'"triton>={backends.dotted(backends.MINIMUM_TRITON)}; ' in requirements


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", (2, 13)), ("3.6.0", (3, 6)), ("2.12.0a0+git1", (2, 12)), ("3.10", (3, 10))]
)
def test_version_tuple(version, expected):
    assert backends.version_tuple(version) == expected


def test_auto_without_triton_warns_once_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "triton_import_problem", lambda: "Triton cannot be imported (test)")
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"slower eager backend .* Triton cannot be imported"):
        assert backends.choose_backend("auto", torch.device("cuda"), torch.bfloat16) == "eager"
    backends._warn_once.cache_clear()


def test_auto_picks_triton_on_a_gpu_and_eager_elsewhere(monkeypatch):
    monkeypatch.setattr(backends, "triton_import_problem", lambda: None)
    assert backends.choose_backend("auto", torch.device("cuda"), torch.bfloat16) == "triton"
    assert backends.choose_backend("auto", torch.device("cuda"), torch.float64) == "eager"
    assert backends.choose_backend("auto", torch.device("cpu"), torch.float32) == "eager"


def test_public_names():
    import pdl_kernels

    guides = ["README.md", "docs/loss.md", "docs/linear.md", "docs/weights.md", "docs/distributed.md"]
    documented = "".join((ROOT / guide).read_text() for guide in guides)
    for name in pdl_kernels.__all__:
        assert hasattr(pdl_kernels, name)
        assert name in documented, f"{name} is in no guide"
    assert re.fullmatch(r"\d+\.\d+\.\d+", pdl_kernels.__version__)
