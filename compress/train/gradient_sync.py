"""Gradient synchronization: gradients averaged over the processes of a training."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress.train.distributed import Processes


class Sharing:
    """The network in every process, with gradients averaged over all of them.

    Those of the first step are averaged when they are complete. That shows whether any parameter
    gets none (a head that is not used, say); from then on they are averaged while further ones are
    computed, with a search for unused parameters only if there are any. A training that may repeat
    a step stays with the first way, so that no process waits for gradients of one that gave up.

    Args:
        task: Maps a batch to the loss; in the first process it has the weights that count.
        processes: This process and those beside it.
        repeats: Whether steps may be repeated.
    """

    def __init__(self, task: nn.Module, processes: Processes, *, repeats: bool) -> None:
        self.module = task  # to be called
        self._task, self._processes, self._repeats = task, processes, repeats
        if processes.world > 1:
            for tensor in (*task.parameters(), *task.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def part(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which one part of a batch is computed."""
        waits = isinstance(self.module, DistributedDataParallel) and not last
        return self.module.no_sync() if waits else contextlib.nullcontext()  # type: ignore[operator]

    def finish(self) -> None:
        """Average the gradients of a step over the processes, where that is not done yet."""
        if self._processes.world == 1 or isinstance(self.module, DistributedDataParallel):
            return
        all_used = self._average()
        if not self._repeats:
            self.module = DistributedDataParallel(self._task, find_unused_parameters=not all_used)

    @torch.no_grad()
    def _average(self) -> bool:
        """Average gradients; returns whether every parameter has one in every process."""
        world = self._processes.world
        trained = [p for p in self._task.parameters() if p.requires_grad]
        here = torch.tensor([p.grad is not None for p in trained], device=self._processes.device)
        users = self._processes.sum(here.float()).tolist()
        gradients = []
        for parameter, count in zip(trained, users, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._processes.sum(flat).div_(world)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(part.view(gradient.shape))
        return bool(min(users) == world)
