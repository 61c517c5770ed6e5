"""What a warm spare loads before it is needed: all that a rank would load with its start, its model and its first step.

No memory of a device is used, and no threads are left: the rank may get any number of them.
"""

import json
from pathlib import Path

import torch

from shoal.kernels.bf16_linear import load_bf16
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.sampling import load_native as load_sampling
from shoal.kernels.select import make_kernels
from shoal.models.implementation import read_model
from shoal.models.precision import PRECISION
from shoal.wire.ranks import PrepareSpare
from shoal.worker import process_groups, rank  # noqa: F401  (the modules of every rank)


def prepare(order: PrepareSpare) -> None:
    """Load the libraries of kernels, and the code of the models.

    Raises:
        CheckpointError: the config.json of a model cannot be read.
    """
    torch.set_num_threads(1)
    make_kernels(order.device, PRECISION[order.dtype].activations)
    load_sampling()
    load_quantized()
    load_bf16()
    for model in order.models:
        read_model(Path(model.folder), model.implementation, json.loads(model.overrides))
