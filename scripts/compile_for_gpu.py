"""Packs the Triton cache of what a session on a GPU will launch, made on a machine without one.

    PYTHONPATH=. python scripts/compile_for_gpu.py FOLDER

With the Triton that this Python imports, for sm_90 (H100, H200), into FOLDER/compiled-<version>.tar.xz. The session
(scripts/gpu_session.sh OUT FOLDER) unpacks it to the path that Triton's entries name. It is found there if Triton's
version and build are the same; otherwise nothing is lost, and everything is compiled as it is needed. For the Triton of
an offline kit that was unpacked to /tmp/offline-kit:

    PYTHONPATH=/tmp/offline-kit:. python3.12 scripts/compile_for_gpu.py FOLDER

Exit status: 0; 1 where something could not be compiled; 2 for wrong arguments.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks import compile_ahead
from pdl_kernels.weights.files import replace_file

KEPT = (".cubin", ".json")  # what a launch reads; the rest is the compiler's intermediate code


def prune(cache: Path) -> int:
    """Leave what a launch reads; the number of compiled kernels."""
    kernels = 0
    for group in cache.glob("*/__grp__*.json"):
        document = json.loads(group.read_text())
        kept = {name: path for name, path in document["child_paths"].items() if name.endswith(KEPT)}
        for name in set(document["child_paths"]) - set(kept):
            Path(document["child_paths"][name]).unlink(missing_ok=True)
        group.write_text(json.dumps({**document, "child_paths": kept}))
        kernels += any(name.endswith(".cubin") for name in kept)
    return kernels


def pack(cache: Path, target: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        archive.add(cache, arcname=cache.name)
    replace_file(target, content.getvalue())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=compile_ahead.PARTS, default=list(compile_ahead.PARTS))
    parser.add_argument("--vocabularies", nargs="+", type=int, help="default: those of the parts")
    chosen = parser.parse_args(arguments)
    cache = compile_ahead.default_cache()
    if cache.exists():
        parser.error(f"{cache} exists; move it away first, since only what is compiled here may be packed")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    options = ["--processes", str(chosen.processes), "--parts", *chosen.parts]
    if chosen.vocabularies:
        options += ["--vocabularies", *map(str, chosen.vocabularies)]
    status = compile_ahead.main(options)
    kernels = prune(cache)
    target = chosen.folder / f"compiled-{cache.name.removeprefix('triton-')}.tar.xz"
    pack(cache, target)
    print(f"written: {target}, {kernels} kernels, {target.stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as elsewhere:  # out of the way of later runs, which compile for themselves
        shutil.move(str(cache), elsewhere)
    return status


if __name__ == "__main__":
    sys.exit(main())
