"""Which number format a network is trained in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from compress.errors import TrainingError

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
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a network computes in ``precision``."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
