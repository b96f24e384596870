"""Run a TensorRT engine: loaded with care, fed on a torch stream, replayed as a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from compress.errors import EngineError
from compress.graph import files
from compress.runtimes import _trt, build_record
from compress.runtimes._session import BuildRequest, Opens, TensorSpec
from compress.runtimes._trt import EngineHeader, Flavour, Log
from compress.runtimes._trt_build import Build, BuildSettings


class Buffers:
    """Device tensors of one set of input shapes, and the recording that replays them."""

    def __init__(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.graph: Any = None


class TrtSession:
    """A loaded engine with one execution context on one stream."""

    def __init__(self, trt: ModuleType, engine: Any, log: Log, *, cuda_graph: bool) -> None:
        self._trt, self._engine, self._log = trt, engine, log
        self._cuda_graph = cuda_graph
        self._context = engine.create_execution_context()
        if self._context is None:
            raise self._no_memory()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._buffers: dict[tuple[tuple[int, ...], ...], Buffers] = {}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = tuple(self._spec(n) for n in names if self._is_input(n))
        self.outputs = tuple(self._spec(n) for n in names if not self._is_input(n))

    @property
    def weights_bytes(self) -> int | None:
        """Return the bytes of weights in the engine, where the version can tell."""
        if hasattr(self._engine, "get_engine_stat") and hasattr(self._trt, "EngineStat"):
            return int(self._engine.get_engine_stat(self._trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        return None

    @property
    def device_memory_bytes(self) -> int:
        """Return the bytes of scratch memory an execution context needs."""
        for name in ("device_memory_size_v2", "device_memory_size"):
            if hasattr(self._engine, name):
                return int(getattr(self._engine, name))
        return 0

    def run(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return one array for each output; copies in and out are part of it."""
        buffers = self._prepared(arrays)
        with torch.cuda.stream(self._stream):
            for slot, array in zip(buffers.inputs, arrays, strict=True):
                slot.copy_(torch.from_numpy(np.ascontiguousarray(array)), non_blocking=True)
            self._execute(buffers)
            answers = [output.to("cpu", non_blocking=True) for output in buffers.outputs]
        self._stream.synchronize()
        return [answer.numpy() for answer in answers]

    def device_latency_ms(self, arrays: tuple[np.ndarray, ...]) -> float:
        """Return the time of one execution on the GPU, without copies, in ms.

        Method: two CUDA events around one execution on an otherwise idle stream.
        """
        buffers = self._prepared(arrays)
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        with torch.cuda.stream(self._stream):
            self._execute(buffers)
            start.record(self._stream)
            self._execute(buffers)
            end.record(self._stream)
        self._stream.synchronize()
        return float(start.elapsed_time(end))

    def close(self) -> None:
        """Free the context, the engine and the buffers, in that order."""
        self._buffers.clear()
        self._context = None
        self._engine = None

    def _prepared(self, arrays: tuple[np.ndarray, ...]) -> Buffers:
        shapes = tuple(array.shape for array in arrays)
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if not self._context.set_input_shape(spec.name, shape):
                raise EngineError(f"the engine refuses the shape {shape} for {spec.name!r}")
        if shapes not in self._buffers:
            try:
                self._buffers[shapes] = self._allocated(shapes)
            except torch.cuda.OutOfMemoryError:
                raise self._no_memory() from None
        buffers = self._buffers[shapes]
        for spec, tensor in zip(self.inputs, buffers.inputs, strict=True):
            self._context.set_tensor_address(spec.name, tensor.data_ptr())
        for spec, tensor in zip(self.outputs, buffers.outputs, strict=True):
            self._context.set_tensor_address(spec.name, tensor.data_ptr())
        return buffers

    def _allocated(self, shapes: tuple[tuple[int, ...], ...]) -> Buffers:
        inputs = [
            torch.empty(shape, dtype=_torch_dtype(spec), device="cuda")
            for spec, shape in zip(self.inputs, shapes, strict=True)
        ]
        outputs = [
            torch.empty(
                tuple(self._context.get_tensor_shape(spec.name)),
                dtype=_torch_dtype(spec),
                device="cuda",
            )
            for spec in self.outputs
        ]
        return Buffers(inputs, outputs)

    def _execute(self, buffers: Buffers) -> None:
        if not self._cuda_graph:
            self._enqueue(self._stream)
            return
        if buffers.graph is None:
            self._enqueue(self._stream)  # allocations of the first run may not be recorded
            self._stream.synchronize()
            buffers.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(buffers.graph, stream=self._stream):
                self._enqueue(self._stream)
        buffers.graph.replay()

    def _enqueue(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"the engine failed to run: {self._log.last_error()}")

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(int(size) for size in self._engine.get_tensor_shape(name))
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name
        limits = None
        if self._is_input(name):
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            limits = (int(low[0]), int(high[0]))
        named = tuple("batch" if size == -1 else size for size in shape)
        return TensorSpec(name, named, dtype, limits)

    def _no_memory(self) -> EngineError:
        free, total = (size >> 20 for size in torch.cuda.mem_get_info())
        return EngineError(
            f"not enough GPU memory: the engine needs {self.device_memory_bytes >> 20} MiB of "
            f"scratch memory, and {free} of {total} MiB are free",
            fix="Build for a smaller largest batch or with a smaller workspace_mib, or close "
            "other programs on the GPU",
        )


class TrtRuntime:
    """What the runtimes of both products have in common."""

    flavour: ClassVar[Flavour]
    cuda_graph: bool  # an option of either

    extension: ClassVar[str] = ".engine"
    opens: ClassVar[Opens] = "engine"
    int8_form: ClassVar[str | None] = "tensorrt"
    zero_weights: ClassVar[str] = (
        "may choose 2:4 kernels on Ampere and later where they are faster; other zeros "
        "cost as much as other weights"
    )

    @classmethod
    def owns(cls, path: Path, magic: bytes) -> bool:
        """Return whether ``path`` begins as an engine of this runtime does."""
        return magic == cls.flavour.tag

    def device_kind(self) -> str:
        """Return where it runs: "cuda"."""
        return "cuda"

    def how(self) -> str:
        """Return what it would run on."""
        return "on the GPU"

    def available(self) -> str | None:
        """Return why engines cannot run here, or None."""
        return self.flavour.unavailable()

    def build(self, source: Path, out: Path, request: BuildRequest) -> dict[str, Any]:
        """Write an engine for the ONNX file ``source``.

        Raises:
            EngineError: the graph is damaged, or the builder cannot take it.
        """
        files.check_onnx(source)
        own = {key: getattr(self, key) for key in vars(BuildSettings()) if hasattr(self, key)}
        settings = BuildSettings(**own | {"timing_cache": self.timing_cache_file()})
        return Build(self.flavour, settings, source, request).run(out)

    def timing_cache_file(self) -> Path | None:
        """Return where the builder keeps what it has timed, if it does."""
        return None

    def open(self, path: Path) -> TrtSession:
        """Load an engine; it needs a GPU that it was built for.

        Raises:
            EngineError: it is damaged, made for something else, or there is no GPU.
        """
        return load_engine(self.flavour, path, cuda_graph=self.cuda_graph)


def load_engine(flavour: Flavour, path: Path, *, cuda_graph: bool) -> TrtSession:
    """Load an engine.

    Raises:
        EngineError: it is damaged, of another version or GPU, or there is no GPU here.
        MissingPackageError: the flavour's package is not installed.
    """
    facts = build_record(path)
    header = EngineHeader.read(path, expected_bytes=facts.get("bytes"))
    trt = flavour.package()
    check_fits(flavour, path, header, facts, installed=str(trt.__version__))
    log = Log(verbose=False)
    runtime = trt.Runtime(log.attached(trt))
    if facts.get("version_compatible") and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(
            f"{flavour.name} {trt.__version__} on {_trt.gpu_name()} does not load it: "
            f"{log.last_error()}",
            where=str(path),
            fix="Build it again on this machine",
        )
    return TrtSession(trt, engine, log, cuda_graph=cuda_graph)


def check_fits(
    flavour: Flavour, path: Path, header: EngineHeader, facts: dict[str, Any], *, installed: str
) -> None:
    """Check, before loading, that an engine was built for what is here.

    Raises:
        EngineError: it was not; the message says for what, and what is here.
    """
    versions_differ = header.version.split(".")[:3] != installed.split(".")[:3]
    if versions_differ and not facts.get("version_compatible"):
        raise EngineError(
            f"was built by {flavour.name} {header.version}, and here is {installed}",
            where=str(path),
            fix="Build it again, or build it with version_compatible",
        )
    here = _trt.gpu_capability()
    if here is None:
        built_for = ", ".join(facts.get("built_for", [])) or "an NVIDIA GPU"
        raise EngineError(
            "there is no NVIDIA GPU here, or no driver for it, and this engine needs one",
            where=str(path),
            expected=f"a GPU the engine was built for: {built_for}",
        )
    if not _covers(facts.get("built_for"), here):
        raise EngineError(
            f"was built for {', '.join(facts['built_for'])}, and here is {_trt.gpu_name()}",
            where=str(path),
            fix="Build it again for this GPU, or with hardware_compatible",
        )


def _covers(built_for: list[str] | None, here: str) -> bool:
    """Return whether one of ``built_for`` ("SM89", "SM80+") is the capability ``here``."""
    if not built_for:
        return True
    major = int(here[2:]) // 10
    return any(
        here == name or (name.endswith("+") and int(name[2:-1]) // 10 <= major)
        for name in built_for
    )


def _torch_dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype or "float32")
    return dtype
