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
LOSSES = ("logits", "linear")
PEERS = tuple(dict.fromkeys(contender.peer for contender in CONTENDERS.values() if contender.peer != OURS))


def available(
    device: torch.device, peers: Collection[str], losses: Collection[str] = LOSSES, *, quick: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """Contenders of the `losses` that can run on `device`, ours first, and why others of the chosen `peers` cannot.

    What a peer cannot do keeps none of its other contenders from running. A reason is that of a contender, by its name,
    or of a peer, where it is the same for everything that the peer has, of either loss.
    """
    found: list[Contender] = []
    reasons: dict[str, str] = {}
    for peer in (OURS, *PEERS):
        if peer != OURS and peer not in peers:
            continue
        contenders = [one for one in CONTENDERS.values() if one.peer == peer and one.loss in losses]
        problems = {one.name: one.problem(device) for one in contenders}
        kept = [one for one in contenders if problems[one.name] is None]
        left_out = {name: problem for name, problem in problems.items() if problem is not None}
        if left_out and not kept:
            whole = {one.problem(device) for one in CONTENDERS.values() if one.peer == peer}
            left_out = {peer: next(iter(left_out.values()))} if len(whole) == 1 else left_out
        reasons.update(left_out)
        for one in kept:
            if quick and one.not_quick:
                reasons[one.name] = f"--quick leaves it out: {one.not_quick}"
            else:
                found.append(one)
    return found, reasons
