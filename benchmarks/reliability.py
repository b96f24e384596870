"""How many damaged and hostile inputs were tried, and what became of them: docs/reliability.md.

    python benchmarks/reliability.py fuzz [--reader NAME]... [--cases 10000] [--seed 0] [--keep DIR]
    python benchmarks/reliability.py table

``fuzz`` changes valid files at random and reads them, each in ten seconds at most; what is neither
a result nor a CompressError is a fault. It writes one JSON for each reader to
benchmarks/results/reliability. ``table`` makes the page of all JSON files there: each is a list of
rows {"input", "tried", "outcome", "command"}, whoever wrote it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

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
seconds, or a wrong result. Files are changed at random (bytes, fields of protobuf messages, values
and keys of JSON, members of archives with their checksums set right); file number *i* depends on
the seed and *i* alone.

| input or fault | tried | what happened | again |
|---|--:|---|---|
"""

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
def table() -> None:
    """Write docs/reliability.md."""
    rows: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("*.json")):
        rows += json.loads(path.read_text())
    lines = [
        f"| {row['input']} | {row['tried']:,} | {row['outcome']} | `{row['command']}` |"
        for row in rows
    ]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
