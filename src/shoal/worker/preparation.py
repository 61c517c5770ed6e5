"""What a fork server loads: all that a rank would load with its start, its model and its first step.

No device is touched, since its driver would not outlive a fork, and no threads are left: the rank may get any number.
"""

import json
from pathlib import Path

import torch

from shoal.errors import ShoalError
from shoal.kernels.bf16_linear import load_bf16
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.sampling import load_native as load_sampling
from shoal.kernels.select import make_kernels
from shoal.log import get_logger
from shoal.models.implementation import read_model
from shoal.models.precision import PRECISION
from shoal.wire.ranks import Preparation
from shoal.worker import process_groups, rank, thread_binding  # noqa: F401  (the modules of every rank)

log = get_logger("fork_server")


def prepare(order: Preparation) -> None:
    """Load the libraries of kernels, and the code of the models. What cannot be loaded is left to the ranks."""
    torch.set_num_threads(1)
    if order.device == "cpu":
        make_kernels(order.device, PRECISION[order.dtype].activations)
        load_sampling()
        load_quantized()
        load_bf16()
    for model in order.models:
        try:
            read_model(Path(model.folder), model.implementation, json.loads(model.overrides))
        except ShoalError as error:  # the rank will say so
            log.debug("%s", error)
