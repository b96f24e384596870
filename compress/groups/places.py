"""Where in the user's program an op comes from."""

from __future__ import annotations

import linecache
import os
import sys
import types
from pathlib import Path

import torch

Place = tuple[str, int]  # file and line of the user's program
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent) + os.sep
_FOREIGN: dict[types.CodeType, bool] = {}  # code of PyTorch, or ours: not the user's program


def _is_foreign(code: types.CodeType) -> bool:
    found = _FOREIGN.get(code)
    if found is None:
        found = _FOREIGN[code] = code.co_filename.startswith((_TORCH, _OURS, "<"))
    return found


def program_place() -> Place:
    """Return file and line of the user's program that is running now.

    A network made of PyTorch's modules alone has no program of its own: then it is the line of
    PyTorch that called the op.
    """
    frame: types.FrameType | None = sys._getframe(1)
    innermost: Place | None = None
    while frame is not None:
        code = frame.f_code
        if not _is_foreign(code):
            return code.co_filename, frame.f_lineno
        if innermost is None and not code.co_filename.startswith(_OURS):
            innermost = code.co_filename, frame.f_lineno
        if code.co_name == "run_traced" and code.co_filename.startswith(_OURS):
            break
        frame = frame.f_back
    return innermost or ("", 0)


def place_of(error: BaseException) -> Place:
    """Return file and line of the user's program where an exception passed last."""
    found: Place = ("", 0)
    trail = error.__traceback__
    while trail is not None:
        if not _is_foreign(trail.tb_frame.f_code) or found == ("", 0):
            found = trail.tb_frame.f_code.co_filename, trail.tb_lineno
        trail = trail.tb_next
    return found


def here() -> str:
    """Return file, line and text of the user's program that is running now."""
    return place_text(program_place())


def place_text(at: Place) -> str:
    """Return a place as text: the end of the file's path, the line, and what it says."""
    file, line = at
    text = linecache.getline(file, line).strip()
    return f"{'/'.join(Path(file).parts[-2:])}:{line} ({text})"
