"""What commands print and write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import progress
from compress.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_result(content: str | RenderableType) -> None:
    """Print text as it is and tables by rich, on stdout."""
    progress.stop()
    if isinstance(content, str):
        sys.stdout.write(printable(content if content.endswith("\n") else content + "\n"))
        return
    from compress.terminal import plain_console

    plain_console().print(content)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """Write ``numbers`` to the file of ``--json``, if there is one."""
    from compress.artifact import write_json

    if path is not None:
        write_json(path, numbers)
