"""PyTorch itself, eager or compiled: the reference the others are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from compress.errors import EngineError, UnknownNameError, UsageError
from compress.modules import full_copy, network_of, set_mode
from compress.modules.detectors import before_nms
from compress.modules.outputs import tensors_of
from compress.runtimes import Runtime
from compress.runtimes._session import BuildRequest, Opens, TensorSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pytorch(Runtime):
    """PyTorch, eager or compiled, on the CPU or a GPU.

    Opens a stage folder, or a module that is passed directly. Answers are float32 arrays.

    Options: ``threads`` (as torch has it if absent); ``device`` ("cpu", "cuda", "auto": a GPU if
    there is one); ``compile`` runs the network through torch.compile; ``cuda_graph`` records it
    once for each shape and replays it; ``dtype`` ("float32", "float16", "bfloat16");
    ``channels_last`` lays images out as convolutions prefer.
    """

    threads: int | None = None
    device: str = "auto"
    compile: bool = False
    cuda_graph: bool = False
    dtype: str = "float32"
    channels_last: bool = True

    extension: ClassVar[str] = ""
    opens: ClassVar[Opens] = "network"
    package: ClassVar[str] = "torch"
    enables: ClassVar[str] = "everything"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES, where="runtime 'pytorch'")

    @staticmethod
    def owns(path: Path, magic: bytes) -> bool:
        """Return whether ``path`` is a stage folder."""
        return path.is_dir()

    def device_kind(self) -> str:
        """Return where it runs: "cpu" or "cuda"."""
        if self.device != "auto":
            return self.device.partition(":")[0]
        return "cuda" if torch.cuda.is_available() else "cpu"

    def how(self) -> str:
        """Return what it would run on."""
        return "on the GPU" if torch.cuda.is_available() else "on the CPU"

    def build(self, source: Path, out: Path, request: BuildRequest) -> dict[str, Any]:
        """Refuse: PyTorch runs stage folders, there is nothing to build.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "PyTorch runs a network as it is and builds no engines",
            expected="runtime onnxruntime, openvino, tensorrt or tensorrt-rtx",
        )

    def open(self, path: Path | nn.Module) -> PytorchSession:
        """Load a stage folder, or take a module as it is (a copy of it, in eval mode).

        Raises:
            EngineError: there is no such GPU, or the path is not a stage folder.
        """
        device = self._device()
        model = _load(path) if isinstance(path, Path) else full_copy(network_of(path))
        model = before_nms(model) or model  # as it is exported, one row for each image
        set_mode(model, training=False)
        model = model.requires_grad_(False).to(device, DTYPES[self.dtype])
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return PytorchSession(model, self, device)

    def _device(self) -> torch.device:
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise EngineError(
                "there is no GPU that PyTorch can use here", fix="Use device 'cpu' or 'auto'"
            )
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UsageError(
                f"no such device {self.device!r}",
                where="runtime 'pytorch'",
                expected="auto, cpu, cuda or cuda:N",
            ) from None
        if self.cuda_graph and device.type != "cuda":
            raise EngineError("a CUDA graph needs a GPU", fix="Leave cuda_graph out")
        return device


class PytorchSession:
    """A module in eval mode, on its device."""

    outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", None, "float32"),)

    def __init__(self, model: nn.Module, options: Pytorch, device: torch.device) -> None:
        self.model: nn.Module | None = model
        self.device = device
        self.inputs: tuple[TensorSpec, ...] = (TensorSpec("input", None, None),)
        self._options = options
        self._graphs: dict[Any, tuple[Any, list[torch.Tensor], list[torch.Tensor]]] = {}
        self._call: Any = torch.compile(model) if options.compile else model

    def run(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return one float32 array for each output."""
        inputs = [self._tensor(array) for array in arrays]
        with self._threads(), torch.inference_mode():
            try:
                answers = self._replayed(inputs) if self._options.cuda_graph else self._run(inputs)
            except torch.cuda.OutOfMemoryError as error:
                raise EngineError(
                    f"not enough GPU memory: {str(error).splitlines()[0]}",
                    fix="Use a smaller batch",
                ) from error
            except RuntimeError as error:
                raise EngineError(f"PyTorch: {str(error).splitlines()[0]}") from error
            return [answer.float().cpu().numpy() for answer in answers]

    def close(self) -> None:
        """Free the module."""
        self.model = self._call = None
        self._graphs.clear()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        own = np.array(array, order="C")  # a network may write into it
        tensor = torch.from_numpy(own).to(self.device)
        if tensor.is_floating_point():
            tensor = tensor.to(DTYPES[self._options.dtype])
        if self._options.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return tensors_of(self._call(*inputs))

    def _replayed(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._recorded([t.clone() for t in inputs])
        graph, static, answers = self._graphs[key]
        for slot, tensor in zip(static, inputs, strict=True):
            slot.copy_(tensor)
        graph.replay()
        return answers

    def _recorded(self, static: list[torch.Tensor]) -> Any:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # let libraries choose their kernels before recording
                self._run(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers = self._run(static)
        return graph, static, answers

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        wanted, before = self._options.threads, torch.get_num_threads()
        if wanted is None or wanted == before:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _load(path: Path) -> nn.Module:
    from compress.models import load_model

    if not path.is_dir():
        raise EngineError(
            "is not a stage folder",
            where=str(path),
            expected="a folder that a run or save_model wrote",
            fix="ONNX files and engines run on onnxruntime, openvino or tensorrt",
        )
    return load_model(path)
