"""torch's own composition: F.cross_entropy with class weights, which it wants in the logits' dtype."""

import torch.nn.functional as F

from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.peers.contender import Contender, Loss


def build(inputs: Inputs) -> Loss:
    weights = inputs.weights.to(inputs.logits.dtype)
    return lambda logits: F.cross_entropy(logits, inputs.targets, weight=weights, ignore_index=IGNORE_INDEX)


CONTENDERS = (Contender("torch", "torch", build),)
