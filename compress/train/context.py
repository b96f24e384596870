"""Training context: number format, modes, random state, device and flags; all restored."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compress.errors import TrainingError
from compress.recipe.settings import TrainSettings
from compress.train.optimizers import frozen_layers


@contextlib.contextmanager
def left_as_found(
    model: nn.Module, settings: TrainSettings, device: torch.device
) -> Iterator[list[nn.Module]]:
    """Prepare a network for training; restore everything but the weights afterwards.

    Modes, ``requires_grad``, device, memory format, global random state and flags of torch are
    as before afterwards.

    Yields:
        The modules that ``settings.freeze_until`` freezes; they stay in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    home = next((tensor.device for tensor in model.parameters()), device)
    frozen = [model.get_submodule(name) for name in frozen_layers(model, settings.freeze_until)]
    devices = [device] if device.type == "cuda" else []
    flags = _flags(settings, device)
    with torch.random.fork_rng(devices=devices), flags, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels, in DDP
        try:
            for module in frozen:
                module.requires_grad_(False)
            last = settings.channels_last and device.type != "mps"
            form = torch.channels_last if last else torch.preserve_format
            model.to(device).to(memory_format=form)
            yield frozen
        finally:
            form = torch.contiguous_format if settings.channels_last else torch.preserve_format
            model.to(home).to(memory_format=form)
            for module, training in modes.items():
                module.training = training
            for parameter, requires_grad in wanted.items():
                parameter.requires_grad_(requires_grad)
                parameter.grad = None


@contextlib.contextmanager
def _flags(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    deterministic, threads = settings.deterministic, torch.get_num_threads()
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        torch.set_num_threads(settings.threads or threads)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_precision(wanted: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": the wanted one, or the fastest safe one for "auto".

    bf16 where the device multiplies it natively (AVX-512 BF16 or AMX; GPUs since Ampere), else
    fp16 on older GPUs and fp32 everywhere else.

    Raises:
        TrainingError: the device has no support for the wanted one.
    """
    if wanted != "auto":
        if device.type == "cuda" and wanted == "bf16" and not torch.cuda.is_bf16_supported():
            raise TrainingError(
                "this GPU does not compute in bf16", where="precision", fix="Set precision: fp16"
            )
        return wanted
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if native else "fp16"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a network computes in ``precision``."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
