"""Optional packages: imported where they are used, and named with their extra when absent."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

from compress.errors import MissingPackageError

DISTRIBUTION = "compress-cnn"  # on the package index, "compress" is another project
SILENCED = {"mlflow": "MLFLOW_DISABLE_TELEMETRY"}  # or it reports its use over the network


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
    if module in SILENCED:  # read at every event: for as long as this process lives
        os.environ.setdefault(SILENCED[module], "true")
    return importlib.import_module(module)


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
