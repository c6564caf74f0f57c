"""The first stage: what machine this is, and the offline kit and the compiled cache unpacked. A process of its own.

    python -m benchmarks.gpu_session.prepare FACTS.json [KIT]

KIT holds install.sh and the parts that it unpacks to /tmp/offline-kit, and compiled-*.tar.xz from
scripts/compile_for_gpu.py. Exit status: 0; 1 without a usable GPU, or where something could not be unpacked.
"""

import argparse
import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_session import paths

OLDEST_CAPABILITY = (8, 0)
# An archive that was cut off or damaged raises the last two.
UNPACKING_ERRORS = (OSError, subprocess.SubprocessError, tarfile.TarError, EOFError, lzma.LZMAError)


def gpu_facts() -> dict[str, Any]:
    import torch

    from benchmarks import environment

    facts: dict[str, Any] = {"problem": None, "torch": torch.__version__, "python": sys.version.split()[0]}
    facts["triton"] = _triton_version(os.environ)
    if not torch.cuda.is_available():
        return {**facts, "problem": "torch sees no GPU", "device": environment.cpu_name(), "folder": "cpu"}
    device = torch.device("cuda")
    facts.update(environment.describe(device, []), folder=environment.device_folder(device))
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        facts["note"] = f"capability {capability}: older than 8.0, for which nothing was compiled or tested"
    torch.ones(1, device=device).item()  # the driver works
    return facts


def unpack(kit: Path) -> dict[str, Any]:
    """What the kit brought."""
    if not kit.is_dir():
        raise FileNotFoundError(f"the kit {kit} is not a folder")
    if (kit / "install.sh").exists():
        subprocess.run(["bash", str(kit / "install.sh"), str(kit)], check=True)
    for archive in sorted(kit.glob("compiled-*.tar.xz")):
        _extract(archive, paths.CACHE_ROOT)
        print(f"unpacked: {archive.name} to {paths.CACHE_ROOT}")
    found: dict[str, Any] = {}
    if (paths.KIT_SITE / "triton").is_dir():
        found["kit_triton"] = _triton_version({**os.environ, "PYTHONPATH": str(paths.KIT_SITE)})
        found["kit_cache"] = paths.cache_of(found["kit_triton"]).is_dir()
    if (paths.KIT_SITE / "liger_kernel").is_dir():
        paths.PEERS_SITE.mkdir(exist_ok=True)
        for part in paths.KIT_SITE.glob("liger_kernel*"):
            if not (paths.PEERS_SITE / part.name).exists():
                (paths.PEERS_SITE / part.name).symlink_to(part)
    return found


def _extract(archive: Path, folder: Path) -> None:
    """The archive's folders into `folder`, all of them or none: Triton would take half a cache for a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as whole, tarfile.open(archive) as packed:
        packed.extractall(whole, filter="data")
        for part in Path(whole).iterdir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
            part.rename(folder / part.name)


def _triton_version(environment: Any) -> str | None:
    """Of the Triton that a process with this environment imports."""
    command = [sys.executable, "-W", "ignore", "-c", "import triton; print(triton.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_session.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("facts", type=Path)
    parser.add_argument("kit", type=Path, nargs="?")
    parser.add_argument("--rehearsal", action="store_true", help="a machine without a GPU is as good")
    chosen = parser.parse_args()
    subprocess.run("nvidia-smi || rocm-smi || true", shell=True)
    status = 0
    try:
        facts = gpu_facts()
    except Exception as error:  # a driver that does not work
        facts = {"problem": f"the GPU does not work: {error}", "folder": "unknown"}
    if chosen.kit is not None:
        try:
            facts.update(unpack(chosen.kit))
        except UNPACKING_ERRORS as error:
            print(f"the kit could not be unpacked: {error}")
            facts["kit_problem"] = str(error)
            status = 1
    if chosen.rehearsal:
        facts.update(problem=None, folder="rehearsal")
    facts["xdist"] = importlib.util.find_spec("xdist") is not None
    print(json.dumps(facts, indent=1))
    chosen.facts.write_text(json.dumps(facts))
    return 1 if facts["problem"] else status


if __name__ == "__main__":
    sys.exit(main())
