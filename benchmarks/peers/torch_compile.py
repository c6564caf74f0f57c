"""torch.compile of F.cross_entropy with class weights, compiled for each shape."""

import shutil

import torch
import torch.nn.functional as F

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss


def _problem(device: torch.device) -> str | None:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "it needs a C++ compiler, and neither g++ nor clang++ is on the PATH"
    return None


def build(inputs: Inputs) -> Loss:
    # Otherwise the shapes of earlier cases count towards the limit of recompilations, past which it runs uncompiled.
    torch.compiler.reset()
    weights = inputs.weights.to(inputs.sources[0].dtype)
    targets = inputs.targets

    @torch.compile(dynamic=False, fullgraph=True)
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, weight=weights, ignore_index=IGNORE_INDEX)

    return loss


CONTENDERS = (
    Contender("torch.compile", "torch.compile", build, problem=_problem, not_quick="it compiles for every shape"),
)
