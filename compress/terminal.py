"""What is printed on a terminal: names from files are shown, never obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from compress.errors import printable

WIDE = 160  # columns of a log or a pipe: nothing is cut


class PlainConsole(Console):
    """A console to which text is only text: no markup, links or emoji, no escapes from names."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is drawn, with what a terminal would obey written as escapes."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


def plain_console(**options: Any) -> PlainConsole:
    """Return a console on stdout."""
    settings = {"soft_wrap": False, "markup": False, "emoji": False, "highlight": False} | options
    console = PlainConsole(**settings)
    return console if console.is_terminal else PlainConsole(**settings | {"width": WIDE})
