"""The processes that share a training, one or torchrun's; gradients are averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from compress.errors import CompressError, TrainingError
from compress.groups.calls import WatchedCalls
from compress.modules.objective import Objective

FAILURE_KEY = "compress/failure"
LONGEST_WAIT = timedelta(days=7)  # torchrun ends a process that waits for one that died


@dataclass(frozen=True)
class Processes:
    """This process and those beside it."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all processes; the same in each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Return whether ``here`` is true in any process."""
        if self.world == 1:
            return here
        return bool(self.sum(torch.tensor(float(here), device=self.device)) > 0)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, statistics of BatchNorm above all."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def first_tells(self, key: str, text: str | None) -> str:
        """Return the first process's ``text`` about ``key``; others wait, however long it takes.

        Each key is told once; a text in other processes is not looked at.
        """
        if self.is_main:
            if self.world > 1:
                _store().set(f"compress/{key}", text)
            return text or ""
        _store().wait([f"compress/{key}"], LONGEST_WAIT)
        return str(_store().get(f"compress/{key}").decode())

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


def join_processes(device: str = "auto") -> Processes:
    """Return this process's place among those that torchrun started, or alone.

    Args:
        device: "auto", or where a training in one process runs: "cpu", "cuda:1".
    """
    from accelerate import PartialState

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone:
        return Processes(PartialState().device if device == "auto" else torch.device(device))
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)  # gloo; without it, processes on CPUs would not meet
    return Processes(state.device, state.process_index, state.num_processes)


@contextlib.contextmanager
def failing_together(processes: Processes) -> Iterator[None]:
    """Tell the other processes why this one fails, and say why they did when they fail first.

    Raises:
        TrainingError: another process died; the message holds its reason.
    """
    if processes.world == 1:
        yield
        return
    store = _store()
    try:
        yield
    except Exception as error:
        reason = _reason_of_others(store, error)
        if reason is not None:
            raise TrainingError(
                f"another process stopped: {reason}", where=f"process {processes.rank}"
            ) from None
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            store.set(FAILURE_KEY, f"process {processes.rank}: {error}")
        _tell_torchrun(error)
        raise


def _store() -> Any:
    """Return the one place that all processes can read."""
    return dist.distributed_c10d._get_default_store()


def _reason_of_others(store: Any, error: Exception) -> str | None:
    """Return why another process failed where ``error`` is only a consequence of that."""
    if isinstance(error, CompressError) or not isinstance(error, RuntimeError):
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return None
    try:
        if store.check([FAILURE_KEY]):
            return str(store.get(FAILURE_KEY).decode())
    except RuntimeError:
        pass
    lost = isinstance(error, dist.DistError) or "onnection" in str(error)
    return "it died without a word (killed, or out of memory)" if lost else None


def _tell_torchrun(error: Exception) -> None:
    """Write the error to where torchrun looks for the reason that it prints."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


class SyncedBatchNorm(WatchedCalls):
    """While active, BatchNorm in training takes its statistics over all processes.

    Works on CPUs and GPUs and leaves the network's modules as they are: it replaces the function
    that they call.

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, https://arxiv.org/abs/1502.03167,
    with mean and variance of the whole batch.
    """

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace ``F.batch_norm``; pass everything else on."""
        if func is F.batch_norm:
            return _synced_batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _synced_batch_norm(  # noqa: PLR0913  # the arguments of F.batch_norm
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    from torch.distributed.nn.functional import all_reduce  # passes gradients on

    axes = [axis for axis in range(x.ndim) if axis != 1]
    whole = x.float()
    count = x.numel() / x.shape[1]
    sums = torch.cat([whole.sum(axes), whole.square().sum(axes), whole.new_tensor([count])])
    sums = all_reduce(sums)  # type: ignore[no-untyped-call]
    channels = x.shape[1]
    total = sums[-1].detach()
    mean = sums[:channels] / total
    variance = (sums[channels:-1] / total - mean.square()).clamp(min=0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (total / (total - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    shape = [1, channels] + [1] * (x.ndim - 2)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    out: Tensor = whole * scale.view(shape) + shift.view(shape)
    return out.to(x.dtype)


class LossModule(nn.Module):
    """Network and objective as one module, so that gradients of both are averaged together."""

    def __init__(self, model: nn.Module, objective: Objective, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.adapters = nn.ParameterList(objective.parameters())
        # In a tuple, neither a teacher nor the compiled twin becomes a submodule.
        network: Any = torch.compile(model) if compiled else model
        self._unregistered = (objective, network)

    def forward(self, images: Tensor, target: Any) -> Tensor:
        """Return the objective's scalar."""
        objective, network = self._unregistered
        return objective(network, images, target)


class Sharing:
    """The network in every process, with gradients averaged over all of them.

    Those of the first step are averaged when they are complete. That shows whether any parameter
    gets none (a head that is not used, say); from then on they are averaged while further ones are
    computed, with a search for unused parameters only if there are any. A training that may repeat
    a step (``repeats``) stays with the first way, so that no process waits for gradients of one
    that gave up. In the first process ``losses`` has the weights that count.
    """

    def __init__(self, losses: LossModule, processes: Processes, *, repeats: bool) -> None:
        self.module: nn.Module = losses  # to be called
        self._losses, self._processes, self._repeats = losses, processes, repeats
        if processes.world > 1:
            for tensor in (*losses.parameters(), *losses.buffers()):
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
            self.module = DistributedDataParallel(self._losses, find_unused_parameters=not all_used)

    @torch.no_grad()
    def _average(self) -> bool:
        """Average gradients; returns whether every parameter has one in every process."""
        world = self._processes.world
        trained = [p for p in self._losses.parameters() if p.requires_grad]
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
