"""README, documentation and examples: every block is run, every command exists, the site builds."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from compress.cli import app

PAGES = [
    Path("README.md"),
    *sorted(Path("docs").rglob("*.md")),
    Path("examples/README.md"),
]
SITE = yaml.safe_load(re.sub(r"!!\S+", "", Path("mkdocs.yml").read_text()))
COMMANDS = typer.main.get_command(app.app).commands
NOT_RUN = "not run by the tests: "
INSTALLS = "pip install"  # the two lines of the README that CI runs


def blocks(page, kind):
    """Return (title, text) of each fenced block of a language."""
    pattern = rf'^```{kind}(?: title="([^"]*)")?\n(.*?)^```$'
    return re.findall(pattern, page.read_text(), flags=re.S | re.M)


def in_order(entry):
    """Yield the pages of the navigation in their order."""
    for each in entry if isinstance(entry, list) else entry.values():
        if isinstance(each, str):
            yield each
        else:
            yield from in_order(each)


LINES = [
    (str(page), line)
    for page in PAGES
    for title, text in blocks(page, "sh")
    for line in text.splitlines()
    if line.startswith("compress ")
]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_line_has_the_options_it_gives(page, line):
    name, *arguments = shlex.split(line)[1:]
    if name.startswith("--"):
        return
    with COMMANDS[name].make_context(name, arguments) as context:
        assert not context.args


def test_every_command_has_a_tutorial():
    told = "".join(page.read_text() for page in Path("docs/tutorials").glob("*.md"))
    assert {name for name in COMMANDS if f"\ncompress {name}" not in told} == set()


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to("docs")) for page in Path("docs").rglob("*.md")}
    assert pages - set(in_order(SITE["nav"])) <= {"results.md"}
    assert set(in_order(SITE["nav"])) <= pages


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short():
    assert len(Path("README.md").read_text().splitlines()) < 120


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tutorials" / "prune" / "index.html").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the tutorials have it: photos of two classes, weights, examples."""
    root = tmp_path_factory.mktemp("tutorial")
    random = np.random.default_rng(0)
    for part, count in (("train", 32), ("validation", 8)):
        for name, shade in (("ants", 60), ("bees", 180)):
            place = root / "photos" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 70, (72, 80, 3)) + shade
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.jpg")
    for file in Path("examples").iterdir():
        shutil.copy(file, root)
    return root


def run_page(page, folder):
    """Run the blocks of a page in their order."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    pattern = r'^```(sh|python|yaml)(?: title="([^"]*)")?\n(.*?)^```$'
    for kind, title, text in re.findall(pattern, page.read_text(), flags=re.S | re.M):
        if title.startswith(NOT_RUN) or INSTALLS in text:
            continue
        if title or kind == "yaml":
            (folder / (title or "block.yaml")).write_text(text)
            continue
        command = ["bash", "-euc", text] if kind == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_every_block_runs_in_the_order_of_the_site(folder):
    pages = [Path("docs") / page for page in in_order(SITE["nav"])]
    for page in pages:
        run_page(page, folder)
    run_page(Path("examples/README.md"), folder)
    load = "compress.load_model('runs/trained').state_dict()"
    code = f"import torch, compress; torch.save({load}, 'net.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    run_page(Path("README.md"), folder)
