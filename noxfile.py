"""The suite with the oldest and the newest packages that pyproject.toml allows.

nox -s oldest            the least version of every dependency, the part of the suite that
touches them
nox -s newest            the latest versions, the whole fast suite
nox -s lock              requirements.lock: what an installation gets today, with hashes
nox -s audit             known weaknesses of what newest installs (pip-audit)
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import nox

PYTHON = "3.11"
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
EXTRAS = ("openvino",)
LOCKED = ("openvino", "tensorrt-rtx")  # of the README's first command
HEAD = "# What pip install '.[openvino,tensorrt-rtx]' gets, with hashes; made by: nox -s lock"
# Of the suite: what calls torch, onnx, onnxruntime, nncf, pydantic, typer and rich.
CHOSEN = (
    *("tests/groups", "tests/graph", "tests/export", "tests/recipe", "tests/cli/test_cli.py"),
    *("tests/models", "tests/prune/test_prune.py", "tests/qdq/test_writer.py"),
    *("tests/quantize/test_calibration.py", "tests/runtimes/test_contract.py"),
    *("tests/report/test_report_parts.py", "tests/pipeline/test_pipeline.py"),
)
EXTRAS_OF_TESTS = ("timm", "explain")  # what chosen tests ask for
TOOLS = ("pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "tensorboard>=2.18")
LEFT_OUT = (
    "tests/cli/test_cli.py::test_help_imports_nothing_heavy",  # typer 0.16 imports rich at once
    "tests/cli/test_cli.py::test_the_schema_can_be_written",  # pydantic 2.10 writes 180 for 180.0
    "tests/recipe/test_recipe.py::test_the_published_schema_is_current",
)

nox.options.sessions = ["newest"]


def needed(extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """Return every dependency with the least version that pyproject.toml allows: name>=version."""
    optional = (each for extra in extras for each in PROJECT["optional-dependencies"][extra])
    return [*PROJECT["dependencies"], *optional]


@nox.session(python=PYTHON)
def oldest(session: nox.Session) -> None:
    """Install the least versions and run the chosen part of the suite."""
    least = (each.replace(">=", "==") for each in needed((*EXTRAS, *EXTRAS_OF_TESTS)))
    session.install(*least, *TOOLS)
    session.install("--no-deps", "-e", ".")
    # what the newest click says of the oldest typer is nobody's fault
    without = (word for test in LEFT_OUT for word in ("--deselect", test))
    chosen = (*CHOSEN, *without, "-n", "2", "-W", "ignore::DeprecationWarning")
    session.run("python", "-W", "ignore", "-m", "pytest", *chosen, *session.posargs)


@nox.session(python=PYTHON)
def newest(session: nox.Session) -> None:
    """Install the latest versions and run the fast suite."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python=PYTHON)
def lock(session: nox.Session) -> None:
    """Write down every package of an installation, with the hashes of its files."""
    session.install("uv")
    extras = (word for extra in LOCKED for word in ("--extra", extra))
    chosen = (
        "--quiet",
        "--universal",
        "--generate-hashes",
        "--no-header",
        "--python-version",
        PYTHON,
    )
    command = ("uv", "pip", "compile", "pyproject.toml", *extras, *chosen, *session.posargs)
    text = session.run(*command, silent=True)
    if not isinstance(text, str):
        session.error("uv said nothing")
    Path("requirements.lock").write_text(f"{HEAD}\n{text}")


@nox.session(python=PYTHON)
def audit(session: nox.Session) -> None:
    """Ask the database of known weaknesses about every installed package; none may be unknown."""
    session.install(*needed(), "pip-audit")
    session.run("pip-audit", "--strict")
