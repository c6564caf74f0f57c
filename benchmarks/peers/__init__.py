"""Who is compared: this package and one small adapter per peer.

To add a peer, write a file with CONTENDERS beside these and name it below.
"""

from collections.abc import Collection

import torch

from benchmarks.peers import (
    cut_cross_entropy,
    fla,
    flash_attention,
    liger,
    pdl,
    quack,
    torch_compile,
    torch_eager,
    unsloth,
)
from benchmarks.peers.contender import Contender

# Ours first: the first contender is the one that runs twice, to bound the noise. Unsloth last: see there.
_MODULES = (pdl, torch_eager, torch_compile, liger, quack, cut_cross_entropy, flash_attention, fla, unsloth)
CONTENDERS: dict[str, Contender] = {contender.name: contender for module in _MODULES for contender in module.CONTENDERS}
OURS = "pdl"
PEERS = tuple(dict.fromkeys(contender.peer for contender in CONTENDERS.values() if contender.peer != OURS))


def available(
    device: torch.device, peers: Collection[str], *, quick: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that can run on `device`, ours first, and for the other chosen `peers` the reason."""
    found: list[Contender] = []
    reasons: dict[str, str] = {}
    for contender in CONTENDERS.values():
        if contender.peer != OURS and contender.peer not in peers:
            continue
        reason = contender.problem(device)
        if reason is not None:
            reasons[contender.peer] = reason
        elif quick and contender.not_quick:
            reasons[contender.name] = f"--quick leaves it out: {contender.not_quick}"
        else:
            found.append(contender)
    return found, reasons
