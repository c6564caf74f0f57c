"""torchtitan's Trainer on a CPU: what it asks of an accelerator. To be imported before anything else of torchtitan."""

import time
import types
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils

utils.device_type = "cpu"
utils.device_module = types.SimpleNamespace(
    current_device=lambda: 0,
    device_count=lambda: 1,
    empty_cache=lambda: None,
    get_device_name=lambda device: "CPU",
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=1),
    memory_stats=lambda device: {},
    reset_peak_memory_stats=lambda: None,
    set_device=lambda device: None,
    synchronize=lambda: None,
)
utils.get_local_device = lambda: torch.device("cpu")
if not hasattr(dist, "set_timeout"):  # torch < 2.14; the Trainer calls it after its first step
    dist.set_timeout = lambda timeout, group: None

from torchtitan import trainer as module_of_trainer  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

# The first process ends every training with two seconds of sleep, for the others to end, too. Here `leave` waits.
module_of_trainer.time = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)

LAYERS = 2


class NoTokenizer(BaseTokenizer):
    """For data that is tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **unused):
        super().__init__()

    def encode(self, *arguments, **options):
        raise NotImplementedError

    decode = encode

    def get_vocab_size(self):
        return 2048


def make_config(folder):
    """The debug model, two layers of it, in float32. FlexAttention has no backward on a CPU; SDPA is causal, too."""
    config = llama3_debugmodel()
    model = config.model_spec.model
    del model.layers[LAYERS:]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dump_folder = str(folder)
    config.tokenizer = NoTokenizer.Config()
    config.training.mixed_precision_param = "float32"
    config.training.max_norm = 1e9
    config.training.disable_cuda_graphs = True
    config.checkpoint.enable = False
    return config


def make_trainer(config) -> Trainer:
    trainer = config.build()
    for part in trainer.model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor, which is 1 here
    return trainer
