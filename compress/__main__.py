"""``python -m compress`` is the command ``compress``."""

from compress.cli.app import main

main()
