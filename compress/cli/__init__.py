"""The command line: one file for each family of commands."""

from __future__ import annotations


def main() -> None:
    """Run the command line: what the installed command ``compress`` calls."""
    from compress.cli import app

    app.main()
