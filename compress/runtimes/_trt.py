"""What TensorRT and TensorRT-RTX share: the package, its log, and the header of an engine."""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compress.errors import EngineError
from compress.packages import install_command, is_installed, require

_HEADER = struct.Struct("<4sI8xQ4B")  # tag, serialization version, bytes in all, four version parts


@dataclass(frozen=True)
class Flavour:
    """One of the two products that share the API."""

    name: str  # of the runtime
    module: str
    tag: bytes  # the first bytes of its engines
    builds_without_gpu: bool

    def package(self) -> ModuleType:
        """Import and return the package.

        Raises:
            MissingPackageError: it is not installed.
        """
        return require(self.module, extra=self.name, purpose=f"runtime {self.name!r}")

    def unavailable(self) -> str | None:
        """Return why engines cannot run here, or None."""
        if not is_installed(self.module):
            return f"the package {self.module!r} is not installed: {install_command(self.name)}"
        if not torch.cuda.is_available():
            return "there is no NVIDIA GPU, or no driver for it"
        return None


TENSORRT = Flavour("tensorrt", "tensorrt", b"ftrt", builds_without_gpu=False)
TENSORRT_RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", b"vtrt", builds_without_gpu=True)


@dataclass(eq=False)
class Log:
    """What TensorRT says while it works, kept instead of printed.

    TensorRT knows one logger for a whole process and ignores any later one. So there is one, and it
    tells every Log that is alive.
    """

    verbose: bool = True  # False: warnings and errors only, for logs that live long
    messages: list[tuple[str, str]] = field(default_factory=list)  # severity, text

    def attached(self, trt: ModuleType) -> Any:
        """Return the logger of this process, which from now on writes here as well."""
        _listening.add(self)
        if trt.__name__ not in _loggers:
            _loggers[trt.__name__] = _logger(trt)
        return _loggers[trt.__name__]

    def hear(self, severity: str, text: str) -> None:
        """Keep one message."""
        if self.verbose or severity in _SERIOUS:
            self.messages.append((severity, text))

    def warnings(self) -> list[str]:
        """Return all warnings, each once, in order."""
        return list(dict.fromkeys(text for level, text in self.messages if level == "WARNING"))

    def errors(self) -> list[str]:
        """Return all errors, each once, in order."""
        return list(dict.fromkeys(text for level, text in self.messages if level in _SERIOUS[:2]))

    def last_error(self) -> str:
        """Return the last error, or a plain word that there is none."""
        found = self.errors()
        return found[-1].strip() if found else "it gives no reason"


_SERIOUS = ("ERROR", "INTERNAL_ERROR", "WARNING")
_listening: weakref.WeakSet[Log] = weakref.WeakSet()
_loggers: dict[str, Any] = {}  # by the name of the module


def _logger(trt: ModuleType) -> Any:
    class Recorder(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            for listener in list(_listening):
                listener.hear(severity.name, msg)

    return Recorder()


@dataclass(frozen=True)
class EngineHeader:
    """What the first bytes of an engine file say.

    The layout is that of TensorRT's own ``printPlanVersion`` (its open-source samples); both
    products write it.
    """

    tag: bytes
    version: str  # "10.8.0.43", of the library that built it

    @classmethod
    def read(cls, path: Path, *, expected_bytes: int | None = None) -> EngineHeader:
        """Return the header of an engine file, which has ``expected_bytes`` by its record.

        Raises:
            EngineError: the file is no engine, or only a part of one.
        """
        with path.open("rb") as file:
            start = file.read(_HEADER.size)
        present = path.stat().st_size
        if len(start) < _HEADER.size or start[:4] not in (TENSORRT.tag, TENSORRT_RTX.tag):
            raise EngineError(
                f"is no TensorRT engine ({present} bytes)",
                where=str(path),
                fix="Build one: compress build FILE.onnx --runtime tensorrt --out FILE",
            )
        tag, _, written, *version = _HEADER.unpack(start)
        total = expected_bytes or (written if tag == TENSORRT_RTX.tag else 0)
        if present < total:
            raise EngineError(
                f"is only a part of an engine: {present} of {total} bytes",
                where=str(path),
                fix="Copy it again, or build it again",
            )
        return cls(tag, ".".join(map(str, version)))


def gpu_name() -> str | None:
    """Return the name and compute capability of the GPU here, "NVIDIA L4 (SM89)", or None."""
    capability = gpu_capability()
    return capability and f"{torch.cuda.get_device_name()} ({capability})"


def gpu_capability() -> str | None:
    """Return the compute capability of the GPU here, "SM89", or None."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}"
