"""Where a network runs: one file per runtime, all with the same few verbs.

A runtime is a dataclass whose fields are its options. Every fact about it stands on it (class
``Runtime`` below has the list), so that no other file spells its name, and::

    available() -> str | None              why it cannot run on this machine, or None
    build(source, out, request) -> dict    write an engine for the ONNX file; facts for its record
    open(path) -> RawSession               load an artifact

``open_session`` puts one wrapper around every session, which checks inputs, so that no runtime
repeats that. ``build_engine`` writes a record (``NAME.json``) beside every engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compress import plugins
from compress.artifact import check_other_file, read_json, sha256, write_json
from compress.errors import EngineError, UsageError, absence
from compress.graph import files
from compress.graph.metadata import input_facts
from compress.runtimes._session import BuildRequest, Opens, RawSession, Session, TensorSpec
from compress.trust import check_engine, remember_engine

if TYPE_CHECKING:  # torch takes seconds to import, and most runtimes have no use for it
    from torch import nn

DEFAULT = "onnxruntime"  # every installation has it, and it opens any ONNX file
ONNX_MAGIC = b"\x08"  # of the field ir_version, which ONNX files begin with

__all__ = [
    "BuildRequest",
    "RawSession",
    "Runtime",
    "Session",
    "TensorSpec",
    "build_engine",
    "build_record",
    "open_session",
    "unavailable",
]


class Runtime(Protocol):
    """What a file in this folder offers; who extends it may leave out what has a value here."""

    extension: ClassVar[str]  # of the files it builds
    opens: ClassVar[Opens]  # ONNX files, engines that it built of them, or torch networks
    int8_form: ClassVar[str | None] = None  # the kind of Q/DQ graph it wants; None: it runs none
    package: ClassVar[str]  # that it needs, as it is imported
    extra: ClassVar[str] = ""  # that installs it; empty where every installation has it
    builds_without_device: ClassVar[bool] = False  # whether it builds where it cannot run
    enables: ClassVar[str]  # what the package is good for
    # What it does with weights that are zero
    zero_weights: ClassVar[str] = "runs dense kernels: zeros cost as much as other weights"

    @staticmethod
    def owns(path: Path, magic: bytes) -> bool:
        """Return whether ``path``, whose first bytes are ``magic``, is a file of it alone."""
        return False

    def device_kind(self) -> str:
        """Return where it runs with these options: "cpu", "cuda", ..."""
        ...

    def how(self) -> str:
        """Return what it runs on here, for people."""
        ...

    def available(self) -> str | None:
        """Return why this runtime cannot run anything on this machine, or None if it can."""
        return None

    def build(self, source: Path, out: Path, request: BuildRequest) -> dict[str, Any]:
        """Write an engine for the ONNX file ``source`` to ``out``; return facts about it."""
        ...

    def open(self, path: Path) -> RawSession:
        """Load an artifact."""
        ...


def open_session(
    path: str | Path | nn.Module,
    runtime: str | Mapping[str, Any] = "onnxruntime",
    *,
    threads: int | None = None,
    device: str = "auto",
    batch: int | None = None,
    **options: Any,
) -> Session:
    """Load an artifact and return a session that checks what it is given.

    Args:
        path: An ONNX file, an engine, or for ``pytorch`` a stage folder or a module.
        runtime: Name of a runtime, or one name with its options.
        threads: CPU threads; all cores if absent. Runtimes of GPUs have no use for it.
        device: "cpu", "cuda", or "auto": a GPU where the runtime finds one.
        batch: The only batch size it will be asked for, where the runtime can make use of that.
        options: Further options of the runtime, as ``compress show runtimes/NAME`` lists them.

    Raises:
        MissingPackageError: the runtime's package is not installed.
        EngineError: the artifact is damaged, made for something else, or cannot be loaded.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise UsageError(f"threads is {threads!r}", expected="a whole number, 1 or more")
    name, given = plugins.parse("runtimes", runtime)
    told = {"threads": threads, "device": device, "batch": batch}
    supplied = {key: value for key, value in told.items() if value is not None}
    plugin = plugins.create("runtimes", {name: given | options}, **supplied)
    source = Path(path) if isinstance(path, str | Path) else path
    where = str(path) if isinstance(path, str | Path) else type(path).__name__
    if isinstance(source, Path):
        check_kind(source, name)
        if type(plugin).opens == "engine":  # it runs what is in the file
            check_engine(source)
    return Session(plugin.open(source), where)


def build_engine(
    path: str | Path,
    out: str | Path,
    *,
    runtime: str | Mapping[str, Any] = "onnxruntime",
    batch: int | tuple[int, int, int] = (1, 1, 8),
    precision: str | None = None,
    **options: Any,
) -> Path:
    """Build an engine from an ONNX file, and its record ``OUT.json`` beside it.

    Args:
        path: The ONNX file; fp32, or with Q/DQ nodes.
        out: The engine to write. The extension is the caller's choice.
        runtime: Name of a runtime, or one name with its options.
        batch: Smallest, usual and largest batch the engine must answer, or one for all three.
        precision: "fp32", "fp16" (the graph is converted first) or "int8" (the graph must hold
            Q/DQ nodes). The graph as it is, if absent.
        options: Further options of the runtime, as ``compress show runtimes/NAME`` lists them.

    Returns:
        ``out``.

    Raises:
        MissingPackageError: the runtime's package is not installed.
        EngineError: the graph is damaged, holds what the runtime does not know, or does not fit.
    """
    source, target = Path(path), Path(out)
    name, given = plugins.parse("runtimes", runtime)
    plugin = plugins.create("runtimes", {name: given | options})
    request = BuildRequest.checked(batch, precision)
    check_other_file(source, target)
    facts = plugin.build(source, target, request)
    record = {
        "runtime": name,
        "batch": list(request.batch),
        "precision": precision,
        "source_sha256": sha256(source),
        "sha256": sha256(target),
        "bytes": target.stat().st_size,
        "input": input_facts(files.load(source, weights=False)),
        **facts,
    }
    write_json(record_path(target), record)
    remember_engine(target)
    return target


def build_record(path: str | Path) -> dict[str, Any]:
    """Return what ``build_engine`` noted about the engine ``path``; empty if it has no record."""
    file = record_path(Path(path))
    if not file.is_file():
        return {}
    record: dict[str, Any] = read_json(file)
    return record


def record_path(engine: Path) -> Path:
    """Return where the record of ``engine`` lies."""
    return engine.with_name(f"{engine.name}.json")


def unavailable(runtime: str) -> str | None:
    """Return why nothing can run on ``runtime`` on this machine, or None if it can."""
    reason: str | None = plugins.create("runtimes", runtime).available()
    return reason


def runtime_class(runtime: str | Mapping[str, Any]) -> type[Runtime]:
    """Return the class of a runtime, which has every fact about it.

    Raises:
        UnknownNameError: there is no such runtime.
    """
    name, _ = plugins.parse("runtimes", runtime)
    plugin: type[Runtime] = plugins.plugin_class("runtimes", name)
    return plugin


def open_built(path: Path, runtime: str | Mapping[str, Any]) -> Session:
    """Open an ONNX file on a runtime; where that opens engines only, one is built beside it."""
    plugin = runtime_class(runtime)
    if plugin.opens == "engine":
        engine = path.with_suffix(plugin.extension)
        path = build_engine(path, engine, runtime=runtime, batch=1)
    return open_session(path, runtime)


def check_kind(path: Path, runtime: str) -> None:
    """Check that ``path`` is an artifact that ``runtime`` opens.

    Raises:
        EngineError: it is absent, or an engine of another runtime; the message says which.
    """
    if not path.exists():
        raise EngineError(absence(path, "file or folder"), where=str(path))
    built_for = kind_of(path)
    if built_for is not None and built_for != runtime:
        thing = "a stage folder, for" if path.is_dir() else "an engine of"
        raise EngineError(
            f"is {thing} {built_for}, and {runtime} was asked to open it",
            where=str(path),
            fix=f"Open it with runtime {built_for!r}",
        )


def kind_of(path: Path) -> str | None:
    """Return the runtime that a file or folder is for; None for ONNX files and others."""
    magic = b""
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
    if magic.startswith(ONNX_MAGIC):
        return None
    owners = (name for name in plugins.names("runtimes") if runtime_class(name).owns(path, magic))
    return next(owners, None)
