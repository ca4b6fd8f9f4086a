"""What launches of products and of attention depend on besides shapes: the GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .jit import nvidia


class Gpu(NamedTuple):
    """What launches depend on.

    nvidia:          whether it is NVIDIA's, whose warps have 32 threads; AMD's have 64.
    dependent:       whether a launch may begin before the one before it ends (NVIDIA, from compute capability 9.0).
    multiprocessors: that it has; shared_memory: bytes that a program can have.
    """

    nvidia: bool
    dependent: bool
    multiprocessors: int
    shared_memory: int


# Where PyTorch does not say how much shared memory a program can have: the least of the GPUs that kernels are for.
LEAST_SHARED_MEMORY = 64 << 10


@functools.cache
def gpu_of(device: int) -> Gpu:
    """What launches on a GPU depend on.

    Args:
        device: index of the GPU.
    """
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    dependent = nvidia() and properties.major >= 9
    return Gpu(nvidia(), dependent, properties.multi_processor_count, shared_memory)
