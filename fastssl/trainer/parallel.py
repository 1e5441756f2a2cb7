"""One run in several processes, as torchrun starts them.

Each has the same networks and its share of every batch. Losses and batch norm see the whole batch,
gradients are averaged, and so all processes hold the same weights, those that one process would
have come to. The first one, the lead, evaluates and writes files.
"""

import datetime
import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastssl.distributed import sum_over_ranks, world_size


def launched() -> bool:
    """Whether torchrun started several processes: a cluster may set RANK for a single one too."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def rank() -> int:
    """Which process this is, counted from 0, also before the processes have met."""
    if world_size() > 1:
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if launched() else 0


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, where a machine has several and none was named."""
    if device.type == "cuda" and device.index is None and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Meet the other processes, if torchrun started some and they have not met yet."""
    if dist.is_initialized() or not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.lru_cache(maxsize=1)
def _patient(everyone: Any) -> Any:
    """A group of all whose wait for one another ends with no usual timeout.

    What is waited for in it is read from disks or networks: a data set, or its images.
    """
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def gathered(value: Any) -> list[Any]:
    """What each process has for value, however long the others take to have it."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, _patient(dist.group.WORLD))
    return values


@contextmanager
def lead_first() -> Iterator[None]:
    """The lead goes through the block before the others do, who find what it left."""
    if rank() > 0:
        gathered(None)
    try:
        yield
    finally:
        if rank() == 0:
            gathered(None)


def mean(x: Tensor) -> Tensor:
    """The mean over processes."""
    return x if world_size() == 1 else sum_over_ranks(x.detach()) / world_size()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether flag is set in any process."""
    return flag if world_size() == 1 else bool(mean(torch.tensor(float(flag), device=device)) > 0)


def wrap(method: nn.Module, device: torch.device) -> nn.Module:
    """What to call for a method's loss, so that processes get the mean of their gradients."""
    if world_size() == 1:
        return method
    network = nn.parallel.DistributedDataParallel
    known = inspect.signature(network).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}  # queues and statistics are the same already
    return network(method, device_ids=[device] if device.type == "cuda" else None, **options)


def convert_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Make every batch norm in a network one of the whole batch."""
    if world_size() == 1:
        return
    norms = [x for x in network.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    if device.type == "cuda":
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        if any(hasattr(norm, "act") for norm in norms):  # timm's, with an activation in it
            from timm.layers.norm_act import convert_sync_batchnorm as convert
        convert(network)
        return
    for norm in norms:
        norm.__class__ = _WholeBatchNorm


class _WholeBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What SyncBatchNorm does on a GPU, for processes on CPUs."""

    act: Any
    drop: Any

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, input: Tensor) -> Tensor:
        x = self._normalized(input)
        return self.act(self.drop(x)) if hasattr(self, "act") else x  # timm's have these two

    def _normalized(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [i for i in range(input.dim()) if i != 1]
        shape = [-1 if i == 1 else 1 for i in range(input.dim())]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = sum_over_ranks(x.new_tensor(x.numel() // x.shape[1]))
        average = sum_over_ranks(x.sum(dims)) / count
        centred = x - average.view(shape)
        variance = sum_over_ranks(centred.square().sum(dims)) / count
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(average, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        result = centred * ((variance + self.eps).rsqrt() * self.weight).view(shape)
        return (result + self.bias.view(shape)).to(input.dtype)
