"""What is printed on a terminal: names from files are shown, never obeyed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from compress.errors import printable

WIDE = 160  # columns of a log or a pipe: nothing is cut


class PlainConsole(Console):
    """A console to which text is only text: no markup, links or emoji, no escapes from names."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is drawn, with what a terminal would obey written as escapes.

        A sentence in a log or a pipe stays on its line, where people search for it.
        """
        options = options or self.options
        is_whole_line = isinstance(renderable, Text) and options.max_width == self.width
        if is_whole_line and not self.is_terminal:
            options = options.update(no_wrap=True, overflow="ignore")
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


def plain_console(**options: Any) -> PlainConsole:
    """Return a console on stdout."""
    settings = {"soft_wrap": False, "markup": False, "emoji": False, "highlight": False} | options
    console = PlainConsole(**settings)
    return console if console.is_terminal else PlainConsole(**settings | {"width": WIDE})


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    numbers: Collection[str] = (),
    whole: Collection[str] = (),
) -> Table:
    """Return a table as every command draws it.

    Args:
        headers: Of the columns, with units.
        rows: Of cells; one may be shorter.
        title: Above the table.
        caption: Below it.
        numbers: Headers of columns that are set to the right and never folded.
        whole: Headers of other columns that are never folded, as what people copy.
    """
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    for header in headers:
        is_number = header in numbers
        drawn.add_column(
            header,
            justify="right" if is_number else "left",
            no_wrap=is_number or header in whole,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn
