"""Int8 of real ONNX files: ours for each target against ONNX Runtime's quantizer and NNCF.

    python benchmarks/real_onnx.py --data FOLDER [--only NAME] [--images 24]

FOLDER holds onnx/*.onnx and photos/. For each file: SQNR of each output on images that nobody
calibrated on, latency as a ratio to fp32 measured in turns in one run, and seconds of calibration.
ONNX Runtime's rows are its minmax, percentile and entropy calibration, weights per channel, and the
same in its symmetric form for TensorRT; NNCF's are its fast and its full bias correction. Files of
opsets without per-channel Q/DQ are converted first for the peers. Graphs for ONNX Runtime
run on its integer kernels; ours for OpenVINO in OpenVINO; TensorRT forms in plain Q/DQ arithmetic.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import int8_peers
import numpy as np
import onnx
import real_files

from compress.quantize import quantize_onnx
from compress.quantize.sqnr import sqnr_db
from compress.runtimes import open_session

HELD_BACK = 8  # images that judge
ROUNDS = 15  # timed in turns
RUNTIME = {
    "onnxruntime": {"onnxruntime": {}},
    "openvino": {"openvino": {}},
    "tensorrt": {"onnxruntime": {"optimization": "none"}},  # plain Q/DQ arithmetic
}


def makers(path: Path, feeds: list, out: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Return, by name of the row, the target it is for and what writes it."""
    made: dict[str, tuple[str, Callable[[], Any]]] = {
        f"ours {target}": (target, lambda t=target: quantize_onnx(path, feeds, out, target=t))
        for target in RUNTIME
    }
    for peer in int8_peers.ON_FEEDS:
        target = "tensorrt" if "tensorrt" in peer else "onnxruntime"
        made[peer] = (target, lambda p=peer: int8_peers.quantize_feeds(p, path, feeds, out))
    return made


def answers(session: Any, feeds: list) -> list[list[np.ndarray]]:
    """Return the outputs for each feed."""
    names = [spec.name for spec in session.inputs]
    return [session.run(*(feed[name] for name in names)) for feed in feeds]


def each_db(reference: list, found: list) -> list[float]:
    """Return the SQNR of each output over all images, decibels."""
    outputs = range(len(reference[0]))
    pairs = [([r[k] for r in reference], [f[k] for f in found]) for k in outputs]
    return [
        round(
            sqnr_db(
                [np.concatenate([a.reshape(1, -1) for a in want])],
                [np.concatenate([a.reshape(1, -1) for a in got])],
            ),
            2,
        )
        for want, got in pairs
    ]


def ratio(plain: Any, int8: Any, feed: dict) -> float:
    """Return the latency of ``int8`` over that of ``plain``, medians of runs in turns."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for which, session in enumerate((plain, int8)):
            start = time.perf_counter()
            answers(session, [feed])
            times[which].append(time.perf_counter() - start)
    return round(statistics.median(times[1]) / statistics.median(times[0]), 2)


def measure(path: Path, photos: Path, images: int) -> list[dict]:
    """Return one row for each graph made of the file ``path``."""
    feeds = real_files.feeds(onnx.load(str(path)), path.stem, photos, images + HELD_BACK)
    held_back, calibration = feeds[:HELD_BACK], feeds[HELD_BACK:]
    rows = []
    with tempfile.TemporaryDirectory() as folder, open_session(path) as fp32:
        reference = answers(fp32, held_back)
        out = Path(folder) / "int8.onnx"
        for name, (target, make) in makers(path, calibration, out).items():
            start = time.perf_counter()
            try:
                make()
            except Exception as error:  # noqa: BLE001 - a peer's failure is a row too
                rows.append({"graph": name, "failed": f"{type(error).__name__}: {error}"[:200]})
                continue
            seconds = time.perf_counter() - start
            (runtime,) = RUNTIME[target].items()
            with (
                open_session(out, runtime=dict([runtime]), threads=1) as int8,
                open_session(path, runtime=runtime[0], threads=1) as plain,
            ):
                row = {
                    "graph": name,
                    "target": target,
                    "sqnr_db": each_db(reference, answers(int8, held_back)),
                    "seconds": round(seconds, 1),
                }
                if target != "tensorrt":
                    row["latency_to_fp32"] = ratio(plain, int8, held_back[0])
            print(path.stem, row, flush=True)
            rows.append(row)
    return rows


def table(files: dict[str, list[dict]]) -> str:
    """Return one row a graph: the worst and the median output."""
    lines = [
        "| file | graph | worst output, dB | median output, dB | latency to fp32 | seconds |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, rows in files.items():
        for row in rows:
            if "failed" in row:
                lines.append(f"| {name} | {row['graph']} | {row['failed'][:60]} | | | |")
                continue
            db = row["sqnr_db"]
            latency = row.get("latency_to_fp32", "")
            lines.append(
                f"| {name} | {row['graph']} | {min(db):.1f} | {statistics.median(db):.1f} | "
                f"{latency} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all files, or one; keep the results of others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", action="append", help="this file; may be given several times")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    file = options.out / "real_onnx.json"
    known = json.loads(file.read_text())["files"] if file.exists() else {}
    for path in sorted((options.data / "onnx").glob("*.onnx")):
        if options.only and path.stem not in options.only:
            continue
        known[path.stem] = measure(path, options.data / "photos", options.images)
        about = {"calibration": options.images, "held_back": HELD_BACK, "files": known}
        file.write_text(json.dumps(about, indent=1) + "\n")
        (options.out / "real_onnx.md").write_text(table(known))
    print(table(known))


if __name__ == "__main__":
    main()
