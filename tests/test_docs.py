"""What the README names exists."""

import re
from pathlib import Path

import pytest
import typer.main

from compress.cli import app

README = Path("README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`?compress ([a-z]+)\b", README)) - {"list"})
LINKS = sorted(set(re.findall(r"\]\(([^)#:]+)\)", README)))
FILES = sorted(set(re.findall(r"`(compress/[\w/.]+|recipes/[\w.-]+|docs/[\w.-]+)`", README)))


@pytest.mark.parametrize("path", [*LINKS, *FILES])
def test_files_that_the_readme_names_exist(path):
    assert Path(path).exists()


def test_commands_that_the_readme_names_exist():
    known = typer.main.get_command(app.app).commands
    assert {name for name in COMMANDS if name not in known} == set()
    assert len(COMMANDS) > 5


def test_the_two_lines_of_the_readme_are_what_ci_runs():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    for word in ("compress run recipes/quickstart.yaml", "-m pytest"):
        assert len([line for line in lines if word in line]) == 1
        assert word in Path(".ci/run").read_text()
