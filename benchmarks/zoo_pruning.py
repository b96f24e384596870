"""Prune torchvision's CNNs to half their MACs, with Torch-Pruning and with compress, in one run.

    python benchmarks/zoo_pruning.py [--models NAME ...] [--folder benchmarks/results]

For each network and tool a fresh process is forked: random weights, random BatchNorm statistics,
224 x 224 (299 for Inception), one thread. The tool prunes another network in it first, so that
code, which is loaded once, is charged to none. Timed: everything from the network in memory to the
pruned network in memory (grouping, scores, choice, cut). Both tools rank by group L2 norm. compress
gets ``keep_macs=0.5``; Torch-Pruning takes a share of channels, so it gets 0.3 off every layer,
which is about half the MACs, in one step. A network counts as covered if the pruned one runs on an
image, answers in the original's shape, has fewer MACs (at most 0.5 for compress), and, for
compress, equals its masked twin to 1e-4 relative. Times are CPU seconds of the process, so that
other work on the machine weighs less; memory is the growth of the peak resident size, over the size
of the network. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: TID253 - this script measures its networks
from torch import nn

from compress import environment
from compress.groups.proof import apply_pruning, prove
from compress.prune.plan import plan_pruning

RESULTS = Path(__file__).parent / "results"
SKIPPED = ("vit", "swin", "maxvit")  # transformers
KEEP_MACS = 0.5
CHANNELS_CUT = 0.3  # Torch-Pruning's share, about half the MACs
LIMIT_S = 600


def networks() -> list[str]:
    """Return the names of torchvision's classification CNNs."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith(SKIPPED)]


def build(name: str) -> nn.Module:
    """Return a network in eval mode with random weights and random BatchNorm statistics."""
    torch.manual_seed(0)
    plain = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}  # or minutes
    model = torchvision.models.get_model(name, weights=None, **plain)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


Done = tuple[nn.Module, dict[str, float], Callable[[], float] | None]  # network, times, proof


def with_compress(model: nn.Module, image: torch.Tensor) -> Done:
    """Return the network pruned by compress, what planning took, and its proof."""
    start = time.process_time()
    plan = plan_pruning(model, image, criterion="l2", keep_macs=KEEP_MACS)
    times = {"plan_cpu_s": round(time.process_time() - start, 3)}
    return apply_pruning(model, plan), times, lambda: prove(model, plan, image)


def with_torch_pruning(model: nn.Module, image: torch.Tensor) -> Done:
    """Return the network pruned, in place, by Torch-Pruning; it plans as it cuts, without proof."""
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    last += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1000]
    pruner = tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=CHANNELS_CUT,
        ignored_layers=last,
    )
    pruner.step()
    return model, {}, None


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], Done]] = {
    "compress": with_compress,
    "torch-pruning": with_torch_pruning,
}


def macs(model: nn.Module, image: torch.Tensor) -> int:
    """Return multiply-accumulates by PyTorch's own counter, without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(image.to("meta"))
    return counter.get_total_flops() // 2


def resident_peak_mib(*, reset: bool = False) -> float:
    """Return the peak resident size of this process; ``reset`` starts it anew."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide a growth
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(tool: str, name: str) -> dict[str, Any]:
    """Return one row: what one tool did to one network."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    TOOLS[tool](build("mnasnet0_5"), torch.randn(1, 3, 224, 224))
    model, size = build(name), 299 if name == "inception_v3" else 224
    image = torch.randn(1, 3, size, size)
    size_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    shape, before = (1, 1000), macs(model, image)
    floor, cpu, wall = resident_peak_mib(reset=True), time.process_time(), time.perf_counter()
    small, times, proof = TOOLS[tool](model, image)
    row: dict[str, Any] = {
        "cpu_s": round(time.process_time() - cpu, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        **times,
        "peak_growth_of_model": round((resident_peak_mib() - floor) / size_mib, 2),
    }
    small.eval()
    with torch.no_grad():
        runs = small(image).shape == shape
    row["kept_macs"] = round(macs(small, image) / before, 4)
    row["difference_from_twin"] = proof() if proof is not None else None
    proved = proof is None or row["difference_from_twin"] <= 1e-4
    row["covered"] = bool(
        runs and proved and row["kept_macs"] <= (KEEP_MACS if proof is not None else 0.99)
    )
    return row


def _child(pipe: Any, tool: str, name: str) -> None:
    try:
        pipe.send(measure(tool, name))
    except Exception as error:  # noqa: BLE001 - whatever stops a tool is its result
        pipe.send({"covered": False, "error": f"{type(error).__name__}: {error}"[:200]})


def forked(tool: str, name: str) -> dict[str, Any]:
    """Return the row measured in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, tool, name))
    process.start()
    theirs.close()
    try:
        row = mine.recv() if mine.poll(LIMIT_S) else {"covered": False, "error": "too slow"}
    except EOFError:
        row = {"covered": False, "error": "the process died"}
    process.kill()
    process.join()
    return dict(row)


def totals(rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return coverage and sums for each tool; sums are over networks both tools cover."""
    both = [n for n, row in rows.items() if all(row[tool]["covered"] for tool in TOOLS)]
    return {
        tool: {
            "covered": sum(row[tool]["covered"] for row in rows.values()),
            "networks": len(rows),
            "cpu_s_of_common": round(sum(rows[n][tool]["cpu_s"] for n in both), 2),
            "cpu_s_of_covered": round(
                sum(row[tool]["cpu_s"] for row in rows.values() if row[tool]["covered"]), 2
            ),
            "plan_cpu_s_of_covered": round(
                sum(row[tool].get("plan_cpu_s", 0) for row in rows.values()), 2
            )
            or None,
            "largest_peak_growth_of_model": max(
                (rows[n][tool]["peak_growth_of_model"] for n in both), default=None
            ),
        }
        for tool in TOOLS
    }


def table(rows: dict[str, dict[str, dict[str, Any]]], summary: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Pruning torchvision's CNNs to half the MACs",
        "",
        "Made by `python benchmarks/zoo_pruning.py`, whose first lines say how.",
        "",
        "| tool | covered | CPU s, common networks | CPU s, covered networks | "
        "planning alone | largest peak growth, x model |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for tool, row in summary.items():
        lines.append(
            f"| {tool} | {row['covered']} of {row['networks']} | {row['cpu_s_of_common']} "
            f"| {row['cpu_s_of_covered']} | {row['plan_cpu_s_of_covered'] or ''} "
            f"| {row['largest_peak_growth_of_model']} |"
        )
    lines += ["", "| network | tool | covered | CPU s | kept MACs | peak growth | twin |"]
    lines.append("|---|---|---|--:|--:|--:|--:|")
    for name, tools in rows.items():
        for tool, row in tools.items():
            if "error" in row:
                lines.append(f"| {name} | {tool} | no: {row['error'][:80]} | | | | |")
                continue
            twin = row["difference_from_twin"]
            lines.append(
                f"| {name} | {tool} | {'yes' if row['covered'] else 'no'} | {row['cpu_s']} "
                f"| {row['kept_macs']} | {row['peak_growth_of_model']} "
                f"| {'' if twin is None else f'{twin:.1e}'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=networks())
    parser.add_argument("--folder", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name in given.models:
        rows[name] = {tool: forked(tool, name) for tool in TOOLS}
        print(name, rows[name], flush=True)
    summary = totals(rows)
    content = {"environment": environment.describe_machine(), "summary": summary, "networks": rows}
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "zoo_pruning.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.folder / "zoo_pruning.md").write_text(table(rows, summary))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
