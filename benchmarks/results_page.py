"""The page of all results, docs/results.md, and its charts, from benchmarks/results.

    python benchmarks/results_page.py [--results benchmarks/results] [--out docs]

Each file NAME.json is a section: what was asked, the command, the date, the machine, a chart where
CHARTS has one, and the table that the benchmark wrote beside it (NAME.md). Date and command are in
results/made.json, which a benchmark's author completes when a file is added; no figure is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes

HERE = Path(__file__).parent
OURS, PEER, PLAIN, BLUE = "#0b6e4f", "#c8553d", "#7a7a7a", "#3f6fb0"
STYLE = {
    "svg.hashsalt": "results", "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
}  # fmt: skip
INTRODUCTION = """# Results

Made by `python benchmarks/results_page.py` from `benchmarks/results`; no figure here was typed.
Every section gives its command, date and machine; the first lines of `benchmarks/NAME.py` say what
is measured and how.
"""


def cpu_runtimes(content: dict[str, Any]) -> mpl.figure.Figure:
    """Speed-up over the original in fp32 on ONNX Runtime, batch 1."""
    rows = content["networks"]
    kinds = ("onnxruntime int8", "openvino fp32", "openvino int8")
    bars = {kind: [(rows[net]["batch 1"].get(kind) or {}) for net in rows] for kind in kinds}
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    _bars(axes, list(rows), bars, "x fp32 on ONNX Runtime, batch 1")
    return figure


def int8_speed(content: dict[str, Any]) -> mpl.figure.Figure:
    """Int8 graphs on ONNX Runtime, batch 1: ours and the peers'."""
    rows = [row for row in content["rows"] if row["runtime"] == "onnxruntime" and row["batch"] == 1]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    graphs = {"ours": "ours onnxruntime", "tuned ONNX Runtime": "ort tuned", "NNCF": "nncf"}
    found = {(row["network"], row["graph"]): row for row in rows}
    bars = {
        name: [found.get((net, graph), {}) for net in networks] for name, graph in graphs.items()
    }
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    _bars(axes, networks, bars, "x fp32, ONNX Runtime, batch 1")
    return figure


def _bars(axes: Axes, groups: list[str], bars: dict[str, list[dict[str, Any]]], label: str) -> None:
    """Draw bars with 95 % intervals, grouped; what was not measured has no bar."""
    colors = dict(zip(bars, (OURS, PLAIN, PEER, BLUE), strict=False))
    width = 0.8 / len(bars)
    for number, (name, rows) in enumerate(bars.items()):
        for place, row in enumerate(rows):
            if row.get("speedup") is None:
                continue
            x = place + (number - (len(bars) - 1) / 2) * width
            axes.bar(x, row["speedup"], width * 0.92, color=colors[name], label=name)
            low, high = row.get("speedup_ci95") or (row["speedup"],) * 2
            axes.plot([x, x], [low, high], color="black", linewidth=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, ncols=len(bars), loc="upper right")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)


def kd_losses(content: dict[str, Any]) -> mpl.figure.Figure:
    """Top-1 of the student by loss: each seed, and the mean."""
    rows = sorted(content["rows"], key=lambda row: row["mean"])
    figure, axes = pyplot.subplots(figsize=(7, 0.3 * len(rows) + 0.9))
    for place, row in enumerate(rows):
        color = PEER if row["loss"] == "none" else OURS
        axes.plot(row["top1_pct"], [place] * len(row["top1_pct"]), "o", color=color, alpha=0.4)
        axes.plot([row["mean"]], [place], "|", color=color, markersize=16, markeredgewidth=2.5)
    axes.set_yticks(range(len(rows)), [row["loss"] for row in rows])
    axes.set_xlabel("top-1, % (dots: seeds; bars: means)")
    return figure


def cifar10_pruning(content: dict[str, Any]) -> mpl.figure.Figure:
    """Top-1 before and after fine-tuning, the best rate and seed of each arm and schedule."""
    best: dict[tuple[str, str], float] = {}
    for row in content["rows"]:
        images = row["epochs"] * row.get("epoch_images", 50_000)
        after = f"{images:,} images{', taught' if row.get('taught') else ''}"
        for stage, value in (("before", row["before_top1_pct"]), (after, row["top1_pct"])):
            best[stage, row["arm"]] = max(best.get((stage, row["arm"]), 0.0), value)
    arms = list(dict.fromkeys(arm for _, arm in best))
    stages = list(dict.fromkeys(stage for stage, _ in sorted(best, key=lambda k: _images(k[0]))))
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.5 * len(stages), 3.8))
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places = [n for n, stage in enumerate(stages) if (stage, arm) in best]
        x = [n + (number - (len(arms) - 1) / 2) * width for n in places]
        heights = [best[stages[n], arm] for n in places]
        color = (PEER, OURS, BLUE, PLAIN)[number]
        drawn = axes.bar(x, heights, width * 0.92, color=color, label=arm)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7, label_type="center", color="white")
    axes.axhline(content["original_top1_pct"], color="black", linestyle=":", label="uncut")
    axes.set_xticks(range(len(stages)), [stage.replace(", ", ",\n") for stage in stages])
    axes.set_ylabel("top-1, %")
    axes.set_ylim(0, 118)
    axes.legend(frameon=False, ncols=len(arms) + 1, loc="upper left", fontsize=8)
    return figure


def _images(stage: str) -> tuple[bool, int]:
    digits = re.sub(r"\D", "", stage)
    return "taught" in stage, int(digits or 0)


def latency_pruning(content: dict[str, Any]) -> mpl.figure.Figure:
    """Top-1 against latency, by runtime; each network by its name."""
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    measured = [name for name in content["runtimes"] if "," not in name]  # without a second run
    for number, runtime in enumerate(measured):
        rows = {k: r for k, r in content[runtime]["results"].items() if "top1_pct" in r}
        x = [row["latency_ms_p50"] for row in rows.values()]
        y = [row["top1_pct"] for row in rows.values()]
        axes.plot(x, y, "o", color=(OURS, BLUE)[number % 2], label=runtime)
        for name, place in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(
                name.removesuffix(" of the latency"),
                place,
                (4, -9),
                textcoords="offset points",
                fontsize=7,
            )
    axes.margins(x=0.12)
    axes.set_xlabel("ms, median, batch 1 (percentages: of the original's latency)")
    axes.set_ylabel("top-1, %, no training")
    axes.legend(frameon=False)
    return figure


def accuracy_latency_front(content: dict[str, Any]) -> mpl.figure.Figure:
    """Top-1 against latency of whole chains, by runtime; filled marks are int8."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in content["rows"]))
    figure, frames = pyplot.subplots(1, len(runtimes), figsize=(9, 4.2), sharey=True, squeeze=False)
    colors = {"not pruned": PLAIN, "compress": OURS, "torch-pruning": PEER}
    marks = {"fp32": "o", "compress": "o", "ort tuned": "s", "nncf": "^"}
    for axes, runtime in zip(frames[0], runtimes, strict=True):
        for row in (row for row in content["rows"] if row["runtime"] == runtime):
            trained = f", {row['epochs']} epoch" if row["epochs"] else ""
            color, int8 = colors[row["pruned_by"]], row["quantizer"] != "fp32"
            axes.plot(
                [row["latency_ms_p50"]],
                [row["top1_pct"]],
                marks[row["quantizer"]],
                color=color,
                markerfacecolor=color if int8 else "none",
                label=f"{row['pruned_by']}{trained}; {row['quantizer']}",
            )
        axes.set_title(runtime)
        axes.set_xlabel("ms, median, batch 1")
    frames[0][0].set_ylabel("top-1, %")
    entries: dict[str, Any] = {}
    for axes in frames[0]:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.set_layout_engine("constrained")
    below = {"loc": "outside lower center", "ncols": 4}
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=7, **below)
    return figure


def pruning_curves(content: dict[str, Any]) -> mpl.figure.Figure:
    """Top-1 before any training against the MACs kept, by network and arm."""
    points = content["points"]
    networks = list(dict.fromkeys(p["network"] for p in points))
    arms = list(dict.fromkeys(p["arm"] for p in points if p["arm"] != "original"))
    figure, frames = pyplot.subplots(
        1, len(networks), figsize=(5.4 * len(networks), 4.6), sharey=True, squeeze=False
    )
    for axes, network in zip(frames[0], networks, strict=True):
        own = [p for p in points if p["network"] == network and "top1_pct" in p]
        whole = [(1.0, p["top1_pct"]) for p in own if p["arm"] == "original"]
        for number, arm in enumerate(arms):
            dots = [(p["macs_kept"], p["top1_pct"]) for p in own if p["arm"] == arm]
            if dots:
                axes.plot(
                    *zip(*sorted(whole + dots), strict=True), label=arm, **_style(arm, number)
                )
        axes.set_title(network)
        axes.set_xlabel("MACs kept")
        axes.invert_xaxis()
    frames[0][0].set_ylabel(f"top-1, %, no training, {content['tested']:,} test images")
    handles, labels = frames[0][0].get_legend_handles_labels()
    below = {"loc": "outside lower center", "ncols": 5}
    figure.set_layout_engine("constrained")
    figure.legend(handles, labels, frameon=False, fontsize=8, **below)
    return figure


def pruning_images(content: dict[str, Any]) -> mpl.figure.Figure:
    """Top-1 before any training against the images that pruning is shown."""
    points = content["points"]
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for number, network in enumerate(dict.fromkeys(p["network"] for p in points)):
        for arm in dict.fromkeys(p["arm"] for p in points):
            own = [p for p in points if (p["network"], p["arm"]) == (network, arm)]
            dots = sorted((p["images"], p["top1_pct"]) for p in own)
            look = _style("obs" if arm == "compress" else arm, number) | {"marker": "osD"[number]}
            axes.semilogx(*zip(*dots, strict=True), label=f"{network}, {arm}", **look)
    axes.set_xlabel("images shown")
    axes.set_ylabel("top-1, %, no training")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _style(arm: str, number: int) -> dict[str, Any]:
    """Return how a curve looks, the same for every network."""
    if arm == "obs":
        return {"color": OURS, "linewidth": 2.6, "marker": "o"}
    if arm == "obs, blocks too":
        return {"color": BLUE, "linewidth": 2.6, "marker": "D", "markersize": 4}
    if arm.startswith("torch-pruning"):
        dashed = "--" if "BatchNorm" in arm else "-"
        return {"color": PEER, "linestyle": dashed, "linewidth": 1.8, "marker": "s"}
    if "not refitted" in arm:
        return {"color": OURS, "linestyle": ":", "linewidth": 1.8, "marker": "o"}
    return {"color": f"C{number}", "linewidth": 1.1, "marker": ".", "alpha": 0.85}


CHARTS: dict[str, Callable[[dict[str, Any]], mpl.figure.Figure]] = {
    "accuracy_latency_front_resnet20": accuracy_latency_front,
    "cifar10_pruning_resnet20": cifar10_pruning,
    "cifar10_pruning_resnet56": cifar10_pruning,
    "cpu_runtimes": cpu_runtimes,
    "int8_speed": int8_speed,
    "kd_losses": kd_losses,
    "latency_pruning_resnet56": latency_pruning,
    "pruning_curves": pruning_curves,
    "pruning_images": pruning_images,
}


def page(results: Path) -> str:
    """Return docs/results.md."""
    made = json.loads((results / "made.json").read_text())
    parts = [INTRODUCTION]
    for name in made:
        file = results / f"{name}.json"
        content = json.loads(file.read_text())
        about = made[name]
        parts.append(
            f"\n## {about['title']}\n\n`{about['command']}`; {about['date']}; {machine(content)}.\n"
        )
        if name in CHARTS:
            parts.append(f"\n![{about['title']}](charts/{name}.svg)\n")
        table = file.with_suffix(".md")
        if table.is_file():
            parts.append(f"\n{_without_title(table.read_text())}")
    return "".join(parts)


def _without_title(text: str) -> str:
    text = re.sub(r"\A# .*\n+", "", text)
    return re.sub(r"^#", "##", text, flags=re.MULTILINE).strip() + "\n"


def machine(content: dict[str, Any]) -> str:
    """Return what a results file says of the machine it was measured on."""
    for place in (content, *(content.get(k) for k in ("environment", "provenance", "machine"))):
        if isinstance(place, str):
            return place
        if not isinstance(place, dict):
            continue
        device = place.get("device", place)
        if "cpu" in device:
            cores = device.get("threads_usable") or device.get("threads")
            return ", ".join(
                str(fact) for fact in (device["cpu"], f"{cores} threads", device.get("gpu")) if fact
            )
    return "the machine was not recorded"


def charts(results: Path) -> dict[str, bytes]:
    """Return the charts by file name, as SVG; each names the digest of the data it shows."""
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, draw in CHARTS.items():
            file = results / f"{name}.json"
            if not file.is_file():
                continue
            figure = draw(json.loads(file.read_text()))
            if figure.get_layout_engine() is None:
                figure.tight_layout()
            stream = io.BytesIO()
            about = {"Date": None, "Description": digest(file)}
            figure.savefig(stream, format="svg", metadata=about)
            pyplot.close(figure)
            drawn[f"{name}.svg"] = stream.getvalue()
    return drawn


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    given = parser.parse_args()
    (given.out / "charts").mkdir(parents=True, exist_ok=True)
    (given.out / "results.md").write_text(page(given.results))
    for name, content in charts(given.results).items():
        (given.out / "charts" / name).write_bytes(content)


if __name__ == "__main__":
    main()
