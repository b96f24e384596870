"""Packages: optional ones, imported where they are used; our own that are functions as well."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from compress.artifact import cache_folder
from compress.errors import MissingPackageError

DISTRIBUTION = "compress-cnn"  # on the package index, "compress" is another project
SILENCED = {"mlflow": "MLFLOW_DISABLE_TELEMETRY"}  # read at every event, or it reports its use
# Packages that report their use over the network, or ask it for something, while they are imported.
SILENT_IMPORTS = {"nncf": ("CI", "NNCF_CI"), "openvino": ("CI",), "ultralytics": ("YOLO_OFFLINE",)}


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import and return ``module``.

    Args:
        module: Dotted import name, ``"openvino"``.
        extra: The extra of this package that installs it, ``"openvino"``; empty where it
            belongs to every installation.
        purpose: What needs it, as the subject of a sentence: ``"runtime 'openvino'"``.

    Raises:
        MissingPackageError: it is not installed; the message holds the command that installs it.
    """
    if not is_installed(module):
        raise MissingPackageError(
            f"{purpose} needs the package {module!r}, which is not installed",
            fix=f"Install it with: {install_command(extra)}",
        )
    if module in SILENCED:
        os.environ.setdefault(SILENCED[module], "true")
    if module not in SILENT_IMPORTS:
        return importlib.import_module(module)
    with _silent(SILENT_IMPORTS[module]):
        return importlib.import_module(module)


@contextlib.contextmanager
def _silent(names: tuple[str, ...]) -> Iterator[None]:
    """Import with ``names`` set to "true"; the environment is then as it was found.

    Ultralytics keeps its settings in a folder of its own, here below ours, and has every process
    that is started later compute with one thread.
    """
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(names, "true"))
    os.environ.setdefault("YOLO_CONFIG_DIR", str(cache_folder()))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def install_command(extra: str = "") -> str:
    """Return the shell command that installs this package with ``extra``, or without one."""
    return f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"


def is_installed(module: str) -> bool:
    """Return whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is absent
        return False


def version(distribution: str) -> str | None:
    """Return the installed version of ``distribution``, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class _CallableModule(ModuleType):
    """A module whose call is that of the function it names in ``__calls__``."""

    __calls__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__calls__)(*args, **kwargs)


def make_callable(module: str, function: str) -> None:
    """Let a call of a module, by its ``__name__``, be one of its ``function``; all else stays."""
    found: Any = sys.modules[module]
    found.__class__ = _CallableModule
    found.__calls__ = function
