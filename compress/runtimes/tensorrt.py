"""TensorRT 10 and 11: engines for one NVIDIA GPU, built on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from compress.artifact import cache_folder
from compress.errors import UsageError
from compress.runtimes._trt import TENSORRT, Flavour, gpu_name
from compress.runtimes._trt_session import TrtRuntime


@dataclass(frozen=True)
class Tensorrt(TrtRuntime):
    """TensorRT 10 or 11: builds on the GPU it is for, and runs there.

    Networks are strongly typed: fp16 and int8 are in the graph, not in flags.

    Options: ``workspace_mib`` limits scratch memory; ``optimization_level`` (0 to 5) trades build
    time for speed; ``tf32`` lets fp32 layers use tensor cores; ``hardware_compatible`` engines run
    on any GPU from Ampere on; ``version_compatible`` engines load in later versions;
    ``timing_cache``: a file, "none", or "auto": one in ~/.cache/compress for this GPU, driver,
    version and these flags; ``cuda_graph`` records an execution once for each shape and replays it.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: str = "auto"
    cuda_graph: bool = False

    flavour: ClassVar[Flavour] = TENSORRT
    package: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt"
    builds_without_device: ClassVar[bool] = False
    enables: ClassVar[str] = "engines for the NVIDIA GPU at hand"

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise UsageError(
                f"optimization_level is {level}", where="runtime 'tensorrt'", expected="0 to 5"
            )

    def timing_cache_file(self) -> Path | None:
        """Return the file that is named; by default one for this GPU, driver and these flags."""
        if self.timing_cache == "none" or gpu_name() is None:
            return None
        if self.timing_cache != "auto":
            return Path(self.timing_cache)
        flags = f"{self.tf32:d}{self.hardware_compatible:d}{self.version_compatible:d}"
        parts = (
            torch.cuda.get_device_name(),
            driver_version(),
            TENSORRT.package().__version__,
            f"{self.optimization_level}-{flags}",
        )
        name = "-".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)
        return cache_folder() / f"{name}.timing"


def driver_version() -> str:
    """Return the version of the NVIDIA driver, or "unknown"."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version: str | bytes = pynvml.nvmlSystemGetDriverVersion()
        return version if isinstance(version, str) else version.decode()
    except Exception:  # noqa: BLE001 - absent package or driver: the cache is keyed less finely
        return "unknown"
