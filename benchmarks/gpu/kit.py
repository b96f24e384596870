"""Everything a machine with an NVIDIA GPU can show, in slices that resume.

    benchmarks/gpu/all.sh [--minutes 8.5] [--only NAME...]   (kit.py run): the next slice
    python benchmarks/gpu/kit.py table                       the tables, from what was measured
    python benchmarks/gpu/kit.py pack                        wheels and engines to carry along
    benchmarks/gpu/all.sh --rehearse --out DIR               all of it, tiny and on the CPU

A slice starts one unit after the other, each in a process of its own, until its minutes are over;
the next call goes on from there. A unit that trains is stopped in the middle and resumes from its
last checkpoint. What a unit finds is in OUT/gpu.json at once, with the device and the driver; a
unit that failed is tried once more, and then stands there with what it said.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WHEELS, ENGINES = HERE / "wheels", HERE / "engines"
DONE, MORE = 0, 75  # exit codes; 75: EX_TEMPFAIL of sysexits, call again
ATTEMPTS = 2
NETWORKS, BATCHES = ("torchvision:resnet50", "torchvision:mobilenet_v2"), (1, 8, 32)
STOP_S = 20.0  # what a unit gets to write its checkpoint in
RESERVE_S = 30.0  # a unit is not started with less time left


@dataclass(frozen=True)
class Unit:
    """One thing to measure: a command that writes a JSON file."""

    name: str
    command: tuple[str, ...]
    resumes: bool = False  # stopped in the middle, it goes on from there


def units(rehearse: bool) -> list[Unit]:
    """Return what is to be measured, the cheapest first."""
    tiny = ("--rehearse",) if rehearse else ()
    measure, latency = str(HERE / "measure.py"), str(HERE / "latency.py")
    found = [Unit(name, (measure, name, *tiny)) for name in ("device", "tests", "engines")]
    for net in ("compress.models.cifar:resnet8",) if rehearse else NETWORKS:
        for size in BATCHES:
            name = f"latency-{net.split(':')[-1]}-{size}"
            found.append(Unit(name, (latency, "--network", net, "--batch", str(size), *tiny)))
    for recipe in sorted((HERE / "recipes").glob("*.yaml")):
        command = (measure, "accuracy", "--recipe", str(recipe), *tiny)
        found.append(Unit(f"accuracy-{recipe.stem}", command, resumes=True))
    return found


def read(out: Path) -> dict[str, Any]:
    """Return what earlier slices left."""
    file = out / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"units": {}}
    return found


def write(out: Path, content: dict[str, Any]) -> None:
    """Write the results and their tables."""
    import tables

    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "gpu.json.part"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(out / "gpu.json")
    (out / "gpu.md").write_text(tables.markdown(content))


def install(site: Path) -> None:
    """Unpack the carried wheels of packages that this Python lacks into ``site``."""
    missing = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if not _has(wheel.name)]
    if missing and not site.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(site), *map(str, missing)], check=True)


def _has(wheel: str) -> bool:
    try:
        importlib.metadata.version(wheel.split("-")[0].replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def carried_out(unit: Unit, out: Path, seconds: float, resumes_at: Path) -> dict[str, Any] | None:
    """Run one unit; return its record, or None if time ran out and it can go on later."""
    file, log = out / "units" / f"{unit.name}.json", out / "units" / f"{unit.name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    path = [str(ROOT), str(out / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, *unit.command, "--json", str(file), "--work", str(resumes_at)]
    start = time.monotonic()
    with log.open("a") as told:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=told, stderr=told, start_new_session=True
        )
        code = _ended(process, seconds)
    record: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if code == 0 and file.is_file():
        return record | {"found": json.loads(file.read_text())}
    if code is None and unit.resumes:
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = f"no result in {seconds:.0f} s" if code is None else f"exit code {code}"
    return record | {"failed": f"{said}: {' | '.join(lines[-3:])}"[-600:]}


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait, then ask the process to stop, then make it; return its code, None if time ran out."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    for how, patience in ((signal.SIGINT, STOP_S), (signal.SIGKILL, None)):
        os.killpg(process.pid, how)  # a group of its own: its workers as well
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    return None


def one_slice(given: argparse.Namespace) -> int:
    """Carry out units until the time is over; return the exit code."""
    end = time.monotonic() + 60 * given.minutes - STOP_S
    out: Path = given.out.resolve()
    content = read(out)
    install(out / "site")
    wanted = [u for u in units(given.rehearse) if not given.only or u.name in given.only]
    if given.only and len(wanted) < len(set(given.only)):
        raise SystemExit(f"--only: known are {', '.join(u.name for u in units(given.rehearse))}")
    tried: set[str] = set()
    while open_units := [u for u in wanted if u.name not in tried and _is_open(content, u)]:
        if end - time.monotonic() < RESERVE_S:
            break
        unit = min(open_units, key=lambda u: _attempts(content, u))  # failures come last
        tried.add(unit.name)
        print(f"{unit.name}: started", flush=True)
        record = carried_out(unit, out, end - time.monotonic(), out / "work")
        if record is None:
            print(f"{unit.name}: goes on in the next slice", flush=True)
            continue
        if "failed" in record:
            record["attempts"] = _attempts(content, unit) + 1
        content["units"][unit.name] = record
        content["rehearsal"] = given.rehearse
        content["date"] = time.strftime("%Y-%m-%d")
        write(out, content)
        print(f"{unit.name}: {record.get('failed') or 'done'}, {record['seconds']} s", flush=True)
    left = [unit.name for unit in wanted if _is_open(content, unit)]
    failed = [u.name for u in wanted if "failed" in content["units"].get(u.name, {})]
    print(f"{len(wanted) - len(left)} of {len(wanted)} units done; failed: {failed or 'none'}")
    print(f"call again for: {', '.join(left)}" if left else "all is done", flush=True)
    return MORE if left else DONE


def _attempts(content: dict[str, Any], unit: Unit) -> int:
    found: int = content["units"].get(unit.name, {}).get("attempts", 0)
    return found


def _is_open(content: dict[str, Any], unit: Unit) -> bool:
    record = content["units"].get(unit.name)
    return record is None or ("failed" in record and record["attempts"] < ATTEMPTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "table", "pack"))
    parser.add_argument("--minutes", type=float, default=8.5, help="of one slice")
    parser.add_argument("--only", nargs="+", default=[], help="names of units")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="results and work")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    given = parser.parse_args()
    if given.verb == "run":
        sys.exit(one_slice(given))
    elif given.verb == "table":
        import tables

        print(tables.markdown(read(given.out)))
    else:
        import pack

        pack.pack(WHEELS, ENGINES, HERE / "README.md")


if __name__ == "__main__":
    main()
