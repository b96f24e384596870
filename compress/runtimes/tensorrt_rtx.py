"""TensorRT-RTX: engines for RTX GPUs, built ahead of time, on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.runtimes._trt import TENSORRT_RTX, Flavour
from compress.runtimes._trt_session import TrtRuntime


@dataclass(frozen=True)
class TensorrtRtx(TrtRuntime):
    """TensorRT-RTX: builds engines without a GPU, for GPUs that are elsewhere.

    An engine is built for the named compute capabilities and finished on the GPU when it is first
    loaded there. Running needs such a GPU. It keeps no timing cache: nothing is timed in a build.

    Options: ``capabilities`` ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121" or "current"; all
    from SM80 on if empty); ``workspace_mib`` limits scratch memory; ``tf32`` lets fp32 layers use
    tensor cores; ``version_compatible`` engines load in later versions; ``cuda_graph`` records an
    execution once for each shape and replays it.
    """

    capabilities: tuple[str, ...] = ()
    workspace_mib: int | None = None
    tf32: bool = True
    version_compatible: bool = False
    cuda_graph: bool = False

    flavour: ClassVar[Flavour] = TENSORRT_RTX
    package: ClassVar[str] = "tensorrt_rtx"
    extra: ClassVar[str] = "tensorrt-rtx"
    builds_without_device: ClassVar[bool] = True
    enables: ClassVar[str] = "engines for RTX GPUs, built on any x86-64 machine"
