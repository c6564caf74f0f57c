"""Where a session finds what was brought along. The same paths on every machine: Triton's cache holds absolute ones."""

from pathlib import Path

KIT_SITE = Path("/tmp/offline-kit")  # where the kit's install.sh unpacks
PEERS_SITE = Path("/tmp/pdl-kernels-peers")  # the kit's peers without its Triton
CACHE_ROOT = Path("/tmp/pdl-kernels-cache")  # of compiled kernels, a folder for each Triton


def cache_of(triton_version: str | None) -> Path:
    return CACHE_ROOT / f"triton-{triton_version or 'unknown'}"
