"""Int8 of real ONNX files: ours for each target against ONNX Runtime's quantizer and NNCF.

    python benchmarks/real_onnx.py --data FOLDER [--only NAME] [--images 16] [--graph ours --again]

FOLDER holds onnx/*.onnx and photos/. For each file: SQNR of each output on images that nobody
calibrated on, latency as a ratio to fp32 measured in turns in one run, and seconds of calibration.
ONNX Runtime's rows are its minmax, percentile and entropy calibration, weights per channel, and the
same in its symmetric form for TensorRT; NNCF's are its fast and its full bias correction. Files of
opsets without per-channel Q/DQ are converted first for the peers. Graphs for ONNX Runtime
run on its integer kernels; those for OpenVINO, NNCF's too, in OpenVINO; TensorRT forms in plain
Q/DQ arithmetic. Rows that are there are kept: a run that was stopped goes on. ``--draw 1`` takes
other photos to calibrate and to judge: where few show what an output looks for, which ones they are
decides more than the method.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import int8_peers
import numpy as np
import onnx
import real_files

from compress.quantize import quantize_onnx
from compress.quantize.sessions import sqnr_db
from compress.runtimes import open_session

HELD_BACK = 48  # images that judge: what detectors look for is on few of them
ROUNDS = 15  # timed in turns
RUNTIME = {
    "onnxruntime": {"onnxruntime": {}},
    "openvino": {"openvino": {}},
    "tensorrt": {"onnxruntime": {"optimization": "none"}},  # plain Q/DQ arithmetic
}


def makers(path: Path, feeds: list, out: Path) -> dict[str, tuple[list[str], Callable[[], Any]]]:
    """Return, by name of the graph, the targets it is measured for and what writes it."""
    made: dict[str, tuple[list[str], Callable[[], Any]]] = {}
    for peer in int8_peers.ON_FEEDS:
        target = "tensorrt" if "tensorrt" in peer else "onnxruntime"
        targets = ["onnxruntime", "openvino"] if "nncf" in peer else [target]
        made[peer] = (targets, partial(int8_peers.quantize_feeds, peer, path, feeds, out))
    for target in RUNTIME:
        made[f"ours {target}"] = ([target], partial(quantize_onnx, path, feeds, out, target=target))
    return made


def answers(session: Any, feeds: list) -> list[list[np.ndarray]]:
    """Return the outputs for each feed."""
    names = [spec.name for spec in session.inputs]
    return [session.run(*(feed[name] for name in names)) for feed in feeds]


def each_db(reference: list, found: list) -> list[float | None]:
    """Return the SQNR of each output over all images, decibels; None where it is undefined."""
    each = []
    for k in range(len(reference[0])):
        want, got = (
            np.concatenate([a[k].reshape(1, -1) for a in x], 1) for x in (reference, found)
        )
        db = sqnr_db([want], [got])
        each.append(None if math.isnan(db) else round(db, 2))
    return each


def ratio(plain: Any, int8: Any, feed: dict) -> float:
    """Return the latency of ``int8`` over that of ``plain``, medians of runs in turns."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for which, session in enumerate((plain, int8)):
            start = time.perf_counter()
            answers(session, [feed])
            times[which].append(time.perf_counter() - start)
    return round(statistics.median(times[1]) / statistics.median(times[0]), 2)


def measure(path: Path, feeds: list, is_wanted: Callable[[str], bool]) -> Iterator[dict]:
    """Yield a row for each target of each wanted graph made of the file ``path``."""
    held_back, calibration = feeds[:HELD_BACK], feeds[HELD_BACK:]
    with tempfile.TemporaryDirectory() as folder, open_session(path) as fp32:
        reference = answers(fp32, held_back)
        out = Path(folder) / "int8.onnx"
        for name, (targets, make) in makers(path, calibration, out).items():
            if not is_wanted(name):
                continue
            start, cpu = time.perf_counter(), time.process_time()
            try:
                make()
            except Exception as error:  # noqa: BLE001 - a peer's failure is a row too
                yield {"graph": name, "failed": f"{type(error).__name__}: {error}"[:200]}
                continue
            row = {
                "graph": name,
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            for target in targets:
                try:
                    yield row | run(path, out, target, reference, held_back)
                except Exception as error:  # noqa: BLE001 - so is a graph that does not run
                    yield row | {"target": target, "failed": f"{type(error).__name__}"[:200]}


def run(path: Path, out: Path, target: str, reference: list, held_back: list) -> dict:
    """Return SQNR of each output, and latency, of the int8 graph ``out`` of ``path``."""
    (runtime,) = RUNTIME[target].items()
    with (
        open_session(out, runtime=dict([runtime]), threads=1) as int8,
        open_session(path, runtime=runtime[0], threads=1) as plain,
    ):
        row = {"target": target, "sqnr_db": each_db(reference, answers(int8, held_back))}
        if target != "tensorrt":
            row["latency_to_fp32"] = ratio(plain, int8, held_back[0])
    return row


def table(files: dict[str, list[dict]]) -> str:
    """Return one row a graph and target: the worst output, the median one, and all."""
    lines = [
        "| file | target | graph | worst output, dB | each output, dB | latency to fp32 | seconds "
        "| CPU seconds |",
        "|---|---|---|--:|---|--:|--:|--:|",
    ]
    for name, rows in files.items():
        for row in sorted(rows, key=lambda row: (row.get("target", ""), row["graph"])):
            where = f"| {name} | {row.get('target', '')} | {row['graph']} |"
            if "failed" in row:
                lines.append(f"{where} | {row['failed'][:80]} | | | |")
                continue
            db = [value for value in row["sqnr_db"] if value is not None]
            lines.append(
                f"{where} {min(db, default=math.nan):.1f} | {' '.join(f'{v:.1f}' for v in db)} | "
                f"{row.get('latency_to_fp32', '')} | {row['seconds']:.0f} | "
                f"{row['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all files, or one; keep the results of others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", action="append", help="this file; may be given several times")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--draw", type=int, default=0, help="another choice of photos")
    parser.add_argument("--graph", default="", help="only graphs whose name begins so: ours, nncf")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    file = options.out / "real_onnx.json"
    files = json.loads(file.read_text())["files"] if file.exists() else {}
    for path in sorted((options.data / "onnx").glob("*.onnx"), key=lambda p: p.stat().st_size):
        if options.only and path.stem not in options.only:
            continue
        drawn = f"{path.stem}, draw {options.draw}" if options.draw else path.stem
        known = files.setdefault(drawn, [])
        if options.again:
            known[:] = [row for row in known if not row["graph"].startswith(options.graph)]
        done = {row["graph"] for row in known}
        photos, count = options.data / "photos", options.images + HELD_BACK
        model = onnx.load(str(path))
        feeds = real_files.feeds(model, path.stem, photos, count, options.draw)
        for row in measure(
            path, feeds, lambda name, done=done: name not in done and name.startswith(options.graph)
        ):
            known.append(row)
            about = {"calibration": options.images, "held_back": HELD_BACK, "files": files}
            file.write_text(json.dumps(about, indent=1) + "\n")
            (options.out / "real_onnx.md").write_text(table(files))
    print(table(files))


if __name__ == "__main__":
    main()
