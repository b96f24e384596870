"""What a command prints and writes, and how it ends: with an exit code and one sentence."""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from errno import EACCES, EIO, EMFILE, ENAMETOOLONG, ENFILE, ENOMEM, EPERM, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from compress import progress
from compress.artifact import FULL
from compress.errors import CompressError, is_out_of_memory, printable
from compress.interruption import MESSAGE, ending_on_signals
from compress.trust import limited

if TYPE_CHECKING:
    from rich.console import RenderableType

# Of whichever click this typer carries: the class with show(), which has no public name there.
ClickException: Any = next(c for c in reversed(typer.BadParameter.__mro__) if hasattr(c, "show"))
GATE_FAILED, USER_ERROR, OUR_FAULT, INTERRUPTED = 1, 2, 70, 130  # 70: EX_SOFTWARE of sysexits
CLOSED = {EACCES, ENAMETOOLONG, EPERM, EROFS}
OF_THE_MACHINE = {*FULL, *CLOSED, EIO, EMFILE, ENFILE, ENOMEM}


def exit_code(call: Callable[[], Any]) -> int:
    """Return the exit code of a command, carried out by ``call``; stderr says what went wrong."""
    try:
        with (
            ending_on_signals() as signals,
            progress.show_progress(),
            warnings.catch_warnings(),
            limited(sys.argv[1:]),
        ):
            warnings.showwarning = _warn
            code = call()
    except CompressError as error:
        sys.stderr.write(f"compress: {error}\n")
        code = USER_ERROR
    except ClickException as error:
        _show_misuse(error)
        code = USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as ended:  # what typer makes of Ctrl-C
        code = ended.code
    except Exception as error:  # noqa: BLE001 - the last net: 1 would read as a failed gate
        code = _unexpected(error)
    if code == INTERRUPTED:
        code = signals.exit_code or INTERRUPTED
        sys.stderr.write(MESSAGE)
    return code if isinstance(code, int) else 0


def _show_misuse(error: Any) -> None:
    """Say in a sentence what is wrong with the words of a command line."""
    context, option = getattr(error, "ctx", None), getattr(error, "param", None)
    told = error.format_message().rstrip(".")
    if context is None or "NoArgs" in type(error).__name__:  # compress alone: its help
        error.show()
        return
    named = context.info_name if context.parent is not None else ""
    parts = [f"{named}: {told}." if named else f"{told}."]
    text = getattr(option, "help", None) or ""
    if "Missing" in told and text:
        first, rest = text[:1], text[1:]
        wanted = f"{first if rest[:1].isupper() else first.lower()}{rest}"
        parts.append(f"Expected {wanted.rstrip('.')}.")
    parts.append(f"See: compress {named}{' ' * bool(named)}--help.")
    sys.stderr.write(printable(f"compress: {' '.join(parts)}\n"))


def _unexpected(error: Exception) -> int:
    """Say in a sentence what nobody foresaw, and where its traceback is; return the exit code."""
    if is_out_of_memory(error):
        sys.stderr.write(
            "compress: out of memory. Make room, or work on less at once: a smaller --batch-size "
            "or --image-size, fewer images; a run keeps what is done, and the same command goes "
            "on.\n"
        )
        return USER_ERROR
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        fix = "Change the permissions or the path" if error.errno in CLOSED else "Make room"
        sys.stderr.write(
            printable(
                f"compress: {place}{error.strerror}. {fix}; a run keeps what is done, and the same "
                "command goes on.\n"
            )
        )
        return USER_ERROR
    first = (str(error).splitlines() or [""])[0]
    sys.stderr.write(
        f"compress: this should not happen: {type(error).__name__}: {first.rstrip('.')}. "
        f"Please report it with the traceback, which is {_traceback_file(error)}\n"
    )
    return OUR_FAULT


def _traceback_file(error: Exception) -> str:
    """Write the traceback of ``error`` to a file and return where it is, or the traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="compress-", suffix="-traceback.txt", delete=False
        ) as file:
            file.write(text)
    except OSError:  # no place to write
        return f"this:\n{text}"
    return f"in {file.name}"


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours as one sentence; one of another package as Python does."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        text = f"compress: warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def print_result(content: str | RenderableType) -> None:
    """Print text as it is and tables by rich, on stdout."""
    progress.stop()
    if isinstance(content, str):
        sys.stdout.write(printable(content if content.endswith("\n") else content + "\n"))
        return
    from compress.terminal import plain_console

    console = plain_console()
    console.print(content, crop=console.is_terminal)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """Write ``numbers`` to the file of ``--json``, if there is one."""
    from compress.artifact import write_json

    if path is not None:
        write_json(path, numbers)
