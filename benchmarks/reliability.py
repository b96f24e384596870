"""How many damaged and hostile inputs were tried, and what became of them: docs/reliability.md.

    python benchmarks/reliability.py fuzz [--reader NAME]... [--cases 10000] [--seed 0] [--keep DIR]
    python benchmarks/reliability.py tests MODULE... [--fast] [--select WORD]
    python benchmarks/reliability.py table

``tests`` runs test modules, the slow tests as well, and notes what each says to have tried (the
fixture ``tried``); a test that fails is a fault. A module may be run in parts: what was noted of
the rest stays, and a row of it names its tests.
``fuzz`` changes valid files at random and reads them, each in ten seconds at most; what is neither
a result nor a CompressError is a fault. It writes one JSON for each reader to
benchmarks/results/reliability. ``table`` makes the page of all JSON files there: each is a list of
rows {"input", "tried", "outcome", "command"}, whoever wrote it, or what the tests of a module have
tried.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# What it does with damaged and hostile inputs

Every row was produced by the command in its last column, `python` before it;
`python benchmarks/reliability.py table` makes this page of the rows in
`benchmarks/results/reliability`. A *fault* is anything that is neither a result nor one sentence
that says what is wrong (a CompressError; exit code 2): another exception, a crash, more than ten
seconds, or a wrong result; *as stated* means that the tests of the module say what must hold, and
it does. Files are changed at random (bytes, fields of protobuf messages, values
and keys of JSON, members of archives with their checksums set right); file number *i* depends on
the seed and *i* alone.

| input or fault | tried | what happened | again |
|---|--:|---|---|
"""

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fuzz(
    reader: Annotated[list[str] | None, typer.Option(help="Names; all if absent")] = None,
    cases: Annotated[int, typer.Option(help="Files of each reader")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of everything random")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder for files that led to a fault")] = None,
) -> None:
    """Change files at random and read them."""
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    from campaign import run
    from readers import READERS

    torch.set_num_threads(1)
    failed = False
    for one in READERS:
        if reader and one.name not in reader:
            continue
        begun = time.monotonic()
        outcome = run(one, cases, seed, keep)
        found = outcome.to_json()
        print(f"{one.name}: {json.dumps(found)}, {time.monotonic() - begun:.0f} s", flush=True)
        for fault in {fault["kind"]: fault for fault in outcome.faults}.values():
            print(f"    {fault.get('case')}: {fault['kind']}: {fault['fault'][:200]}", flush=True)
        failed = failed or bool(outcome.faults)
        row = {
            "input": one.about,
            "tried": cases,
            "outcome": f"{found['results']:,} read, {found['refused']:,} refused in a sentence, "
            f"**{found['faults']:,} faults**; the slowest {found['slowest_s']:.1f} s",
            "command": f"benchmarks/reliability.py fuzz --reader {one.name} --cases {cases}"
            + (f" --seed {seed}" if seed else ""),
            "kinds": found["kinds"],
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"fuzz-{one.name}.json").write_text(json.dumps([row], indent=1) + "\n")
    raise typer.Exit(int(failed))


@app.command()
def tests(
    modules: Annotated[list[Path], typer.Argument(help="Test modules")],
    fast: Annotated[bool, typer.Option("--fast", help="Leave the slow tests out")] = False,
    select: Annotated[str, typer.Option(help="As pytest -k: a part; the rest stays noted")] = "",
) -> None:
    """Run tests and note what they tried."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        command = [sys.executable, "-m", "pytest", "-q", *map(str, modules), f"--junitxml={found}"]
        command += ["--tb=short", "-o", "junit_family=xunit1"]  # the other has no properties
        command += [] if fast else ["-m", "not gpu"]
        command += ["-k", select] if select else []
        code = subprocess.run(command, cwd=ROOT).returncode
        cases = list(ElementTree.parse(found).iter("testcase"))
    for module in modules:
        name = ".".join(module.with_suffix("").parts)
        told = (_noted(case) | {"part": select} for case in cases)
        ran = {each["test"]: each for each in told if each["module"] == name}
        place = RESULTS / f"{name.replace('.', '-')}.json"
        before = json.loads(place.read_text())["tests"] if place.exists() else []
        kept = [each for each in before if each["test"] not in ran]
        noted = sorted([*kept, *(each for each in ran.values() if each["tried"])], key=_test)
        place.write_text(json.dumps({"module": str(module), "tests": noted}, indent=1) + "\n")
    raise typer.Exit(code)


def _test(noted: dict[str, Any]) -> str:
    return str(noted["test"])


def _noted(case: ElementTree.Element) -> dict[str, Any]:
    """Return what one test says to have tried, [input, cases, what was found], and if it failed."""
    properties = (each for each in case.iter("property") if each.get("name") == "tried")
    return {
        "module": case.get("classname"),
        "test": case.get("name", ""),
        "tried": [json.loads(each.get("value", "")) for each in properties],
        "failed": case.find("failure") is not None or case.find("error") is not None,
    }


def _rows(module: str, tests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for everything that the tests of a module have tried."""
    counts: dict[str, int] = {}
    faults: dict[str, int] = {}
    notes: dict[str, list[str]] = {}
    tests_of: dict[str, set[str]] = {}  # those run in parts
    for test in tests:
        for what, count, note in test["tried"]:
            counts[what] = counts.get(what, 0) + count
            faults[what] = faults.get(what, 0) + test["failed"]
            notes.setdefault(what, []).extend([note] * bool(note))
            tests_of.setdefault(what, set()).add(
                test["test"].split("[")[0] * bool(test.get("part"))
            )
    for what, count in counts.items():
        told = _joined(notes[what])
        names = " or ".join(sorted(tests_of[what] - {""}))
        part = f' --select "{names}"' if names else ""
        yield {
            "input": what,
            "tried": count,
            "outcome": f"as stated, **{faults[what]} faults**" + f"; {told}" * bool(told),
            "command": f"benchmarks/reliability.py tests {module}{part}",
        }


def _joined(notes: list[str]) -> str:
    """Return notes as one text; of notes that differ in one number alone, its range."""
    different = list(dict.fromkeys(notes))
    words = {NUMBER.sub("#", note) for note in different}
    if len(different) > 1 and len(words) == 1 and (text := words.pop()).count("#") == 1:
        numbers = sorted((found for note in different for found in NUMBER.findall(note)), key=float)
        return text.replace("#", f"{numbers[0]} to {numbers[-1]}")
    return "; ".join(different)


@app.command()
def table() -> None:
    """Write docs/reliability.md."""
    rows: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        rows += found if isinstance(found, list) else _rows(found["module"], found["tests"])
    lines = [
        f"| {row['input']} | {row['tried']:,} | {row['outcome']} | `{row['command']}` |"
        for row in rows
    ]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
