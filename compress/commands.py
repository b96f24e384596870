"""What each command does: options to a recipe or to one call, and its answer ready to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import plugins
from compress.errors import RecipeError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.data import Dataset
    from compress.report import Report

Given = Mapping[str, Any]  # the options of a command, as parsed
RECALIBRATION_BATCHES = 8  # of BatchNorm, after each cut that is judged
DATA_OPTIONS = ("image_size", "batch_size", "workers")
DEFAULT_TARGETS = ({"runtime": "onnxruntime", "precision": "fp32"},)


def run(recipe: Path, out: Path | None, overrides: Sequence[str], *, fresh: bool) -> Report | None:
    """Carry out a recipe; see ``pipeline.run``."""
    from compress import pipeline

    return pipeline.run(recipe, out, overrides=overrides, fresh=fresh)


def dry_run(recipe: Path, overrides: Sequence[str]) -> str:
    """Return the recipe as it would be run, with every default, after all checks."""
    from compress.pipeline.preflight import preflight
    from compress.recipe import dump, load_recipe

    resolved = load_recipe(recipe, overrides)
    preflight(resolved, where=str(recipe))
    return dump(resolved)


def train(given: Given) -> Report | None:
    """Run a recipe of one training."""
    return _verb("train", given, [{"train": _present(given, epochs="epochs")}])


def prune(given: Given) -> Report | None:
    """Run a recipe that prunes, and then trains if epochs are given."""
    names = ("criterion", "keep_macs", "keep_params", "keep_channels", "latency_ms", "runtime")
    cut = _present(given, **{name: name for name in (*names, "round_to")})
    if not {"keep_macs", "keep_params", "keep_channels", "latency_ms"} & cut.keys():
        cut["keep_macs"] = 0.5
    stages: list[dict[str, Any]] = [{"prune": cut}]
    after = _present(given, epochs="epochs", teacher="teacher")
    if after.get("epochs"):
        stages.append({"distill" if "teacher" in after else "finetune": after})
    elif "teacher" in after:
        raise UsageError("a teacher without training", fix="Say how long: --epochs N")
    targets = [{"runtime": given["runtime"] or "onnxruntime", "precision": "fp32"}]
    return _verb("prune", given, stages, targets)


def distill(given: Given) -> Report | None:
    """Run a recipe of one distillation."""
    learn = _present(
        given, teacher="teacher", teacher_weights="teacher_weights", loss="losses", epochs="epochs"
    )
    return _verb("distill", {**given, "model": given["student"]}, [{"distill": learn}])


def quantize(given: Given) -> Report | None:
    """Run a recipe that writes int8 graphs."""
    settings = _present(
        given, method="method", observer="observer", samples="samples", max_drop="max_drop_pct"
    )
    if given["qat_epochs"]:
        settings["qat"] = {"epochs": given["qat_epochs"], "lr": 1e-3}
    targets = [_int8_target(name) for name in given["target"] or ["onnxruntime"]]
    return _verb("quantize", given, [{"quantize": settings}], targets)


def export(given: Given) -> str:
    """Write a network as ONNX and say what was written."""
    import torch

    from compress.export import export_onnx
    from compress.measure import count_onnx, size_mib
    from compress.models import check_forward, load_model

    model = load_model(given["model"], given["weights"], given["num_classes"])
    example = torch.zeros(1, *_integers(given["input_size"], "--input-size", 3))
    check_forward(model, example)
    path = export_onnx(model, example, given["out"], opset=given["opset"], softmax=given["softmax"])
    count = count_onnx(path)
    return (
        f"{path}: {count.params:,} parameters, {count.macs:,} MACs, {size_mib(path):.2f} MiB; "
        f"equal to torch"
    )


def build(given: Given) -> str:
    """Build an engine and say what was built."""
    from compress.measure import size_mib
    from compress.runtimes import build_engine

    smallest, usual, largest = _integers(given["batch"], "--batch", 3)
    path = build_engine(
        given["file"],
        given["out"],
        runtime=given["runtime"],
        batch=(smallest, usual, largest),
        precision=given["precision"],
    )
    return f"{path}: engine for {given['runtime']}, {size_mib(path):.2f} MiB"


def bench(given: Given) -> RenderableType:
    """Measure artifacts side by side."""
    from compress.side_by_side import bench_artifacts

    found = bench_artifacts(
        given["artifacts"],
        runtimes=given["runtime"] or (),
        batches=[int(part) for part in _floats(given["batch"], "--batch")],
        threads=given["threads"],
        dataset=_dataset(given) if given["data"] else None,
    )
    _write_json(given["json"], found.to_json())
    return found.table()


def compare(given: Given) -> RenderableType:
    """Compare two artifacts on real images."""
    from compress.side_by_side import compare_artifacts

    found = compare_artifacts(
        Path(given["reference"]),
        Path(given["candidate"]),
        _dataset(given),
        bisect=given["bisect"],
    )
    _write_json(given["json"], found.to_json())
    return found.table()


def lint(given: Given) -> tuple[RenderableType, bool]:
    """Return what an int8 graph suffers from, and whether anything is left that it does.

    With ``--fix`` the mended file is written and what is left in it is returned.
    """
    from rich import box
    from rich.table import Table

    from compress.lint import fix_onnx, lint_onnx

    findings = lint_onnx(given["file"], given["target"])
    if given["fix"]:
        if given["out"] is None:
            raise UsageError("--fix needs a file to write", fix="Give --out FILE")
        findings = fix_onnx(given["file"], given["out"], given["target"])
    elif given["out"] is not None:
        raise UsageError("--out without --fix would write nothing", fix="Give --fix as well")
    _write_json(given["json"], [finding.to_json() for finding in findings])
    title = f"{len(findings)} findings for {given['target']}"
    if given["fix"]:
        title += f" left in {given['out']}"
    table = Table("rule", "node", "what it costs", "fixable", title=title, box=box.SIMPLE_HEAD)
    for finding in findings:
        table.add_row(finding.rule, finding.node, finding.message, "yes" if finding.fixable else "")
    return table, bool(findings)


def sensitivity(given: Given) -> RenderableType:
    """Show which layers cannot bear to be pruned or quantized."""
    dataset = _dataset(given)
    if given["quantize"]:
        return _quantize_sensitivity(given, dataset)
    return _prune_sensitivity(given, dataset)


def _prune_sensitivity(given: Given, dataset: Dataset) -> RenderableType:
    import itertools

    from rich import box
    from rich.table import Table

    from compress import sensitivity as curves
    from compress.evaluate import predict
    from compress.models import check_classes, load_for

    classes = len(dataset.classes)
    model = load_for(classes, given["model"], given["weights"], given["num_classes"])
    check_classes(model, dataset.example, classes)
    found = curves.prune_sensitivity(
        model,
        dataset.example,
        lambda cut: float(100 * predict(cut, dataset.batches("validation")).correct.mean()),
        recalibrate=list(itertools.islice(dataset.batches("train"), RECALIBRATION_BATCHES)),
    )
    _write_json(given["json"], found.to_json())
    if given["out"] is not None:
        curves.plot_sensitivity(found, given["out"])
    title = f"top-1 on validation images, %, of {found.baseline_top1_pct:.2f} uncut"
    shares = [point.keep_channels for point in found.curves[0].points]
    table = Table(
        "layer", *(f"keep {share:g}" for share in shares), title=title, box=box.SIMPLE_HEAD
    )
    for curve in found.curves:
        table.add_row(curve.group, *(f"{point.top1_pct:.2f}" for point in curve.points))
    return table


def _quantize_sensitivity(given: Given, dataset: Dataset) -> RenderableType:
    raise UsageError("waiting")


def verify(run: Path, json: Path | None) -> tuple[RenderableType, bool]:
    """Return whether the files of a run are those that its stages wrote, as text and as a claim."""
    from compress.verify import verify as verified

    found = verified(run)
    _write_json(json, found.to_json())
    lines = [str(finding) for finding in found.findings]
    lines.append(f"{len(found.files)} files checked, {len(found.findings)} problems")
    return "\n".join(lines), found.intact


def bundle(run: Path, out: Path) -> str:
    """Pack a run for a device and say what was written."""
    from compress.bundle import write_bundle

    return f"{write_bundle(run, out)}: unpack it on the device and run python3 run.py"


def doctor(json: Path | None, *, selftest: bool) -> RenderableType:
    """Show what is installed, and what each missing piece would enable."""
    from compress import doctor as examined

    found = examined.examine(selftest=selftest)
    _write_json(json, found.to_json())
    return found.table()


def summary(report: Report) -> RenderableType:
    """Return what is printed after a run: tables, gates, verdict."""
    from compress.report import summary as summarized

    return summarized(report)


def report(runs: Sequence[Path], out: Path | None, *, force: bool) -> RenderableType:
    """Write the report of one run again, or one comparison of several."""
    from compress import report as reports

    if len(runs) == 1:
        folder = out or runs[0]
        return reports.summary(reports.write(reports.read_run(runs[0]), folder), folder)
    if out is None:
        raise UsageError("several runs need a folder for their comparison", fix="Give --out DIR")
    return reports.compare_runs(runs, out, force=force)


def check(recipes: Sequence[Path], overrides: Sequence[str]) -> str:
    """Check recipes without running them; one error lists the problems of all of them."""
    from compress.pipeline.preflight import preflight
    from compress.recipe import load_recipe

    problems = []
    for path in recipes:
        try:
            preflight(load_recipe(path, overrides), where=str(path))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return "\n".join(f"{path}: can be run" for path in recipes)


def list_plugins(kind: str | None) -> RenderableType:
    """Return a table of plug-ins with the first lines of their documentation."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for header in ("kind", "name", "what it is"):
        table.add_column(header, no_wrap=header != "what it is")
    for each in plugins.KINDS if kind is None else [kind]:
        for name in plugins.names(each):
            first, *_ = plugins.documentation(each, name).splitlines() or [""]
            table.add_row(each, name, first)
    return table


def show(plugin: str) -> str:
    """Return the documentation and the options of one plug-in."""
    import dataclasses

    kind, _, name = plugin.partition("/")
    if kind not in plugins.KINDS or not name:
        raise UnknownNameError("kind of plug-in", kind, plugins.KINDS)
    lines = [plugins.documentation(kind, name), "", "Options:"]
    for option, default in plugins.options(kind, name).items():
        required = default is dataclasses.MISSING
        lines.append(f"  {option}: {'required' if required else repr(default)}")
    return "\n".join(lines if len(lines) > 3 else [*lines[:-1], "No options."])


def schema(out: Path | None) -> str:
    """Return the JSON Schema of recipes, or write it to ``out``."""
    import json

    from compress import recipe
    from compress.artifact import write_json

    if out is None:
        return json.dumps(recipe.schema(), indent=2)
    write_json(out, recipe.schema())
    return f"{out}: JSON Schema of recipes"


def content(
    given: Given, name: str, stages: Sequence[Given], targets: Sequence[Given] = DEFAULT_TARGETS
) -> dict[str, Any]:
    """Return the recipe that the options of a verb stand for, as it would be in YAML."""
    model = {"name": given["model"]}
    model |= _present(given, weights="weights", num_classes="num_classes")
    return {
        "name": name,
        "model": model,
        "data": _data(given),
        "seed": given["seed"],
        "stages": list(stages),
        "targets": list(targets),
    }


def _verb(
    name: str,
    given: Given,
    stages: Sequence[Given],
    targets: Sequence[Given] = DEFAULT_TARGETS,
) -> Report | None:
    """Run the recipe of one verb: the same pipeline, run folder and report as any other."""
    from compress import pipeline
    from compress.recipe import apply_override, validate

    written = content(given, name, stages, targets)
    for override in given["overrides"] or []:
        apply_override(written, override)
    recipe = validate(written, where=f"compress {name}")
    return pipeline.run(recipe, given["out"], fresh=given["fresh"])


def _dataset(given: Given) -> Dataset:
    from compress.data import load_data
    from compress.settings import DataSettings

    return load_data(DataSettings(**_data(given)), given.get("seed", 0))


def _data(given: Given) -> dict[str, Any]:
    """Return the data part of a recipe from ``--data`` and the options beside it."""
    kind, _, root = given["data"].partition(":")
    data: dict[str, Any] = {"name": kind} | ({"root": root} if root else {})
    data |= _present(given, **{option: option for option in DATA_OPTIONS})
    for option in ("mean", "std"):
        if given.get(option) is not None:
            data[option] = _floats(given[option], f"--{option}")
    return data


def _write_json(path: Path | None, numbers: Any) -> None:
    from compress.artifact import write_json

    if path is not None:
        write_json(path, numbers)


def _int8_target(name: str) -> dict[str, Any]:
    """Return where the graph for ``name`` is run: TensorRT in the flavour that is installed."""
    from compress.packages import is_installed

    if name == "tensorrt" and not is_installed("tensorrt"):
        return {"runtime": "tensorrt-rtx", "precision": "int8", "when_installed": True}
    return {"runtime": name, "precision": "int8"}


def _present(given: Given, **names: str) -> dict[str, Any]:
    """Return the options that were given, by their name in a recipe."""
    return {key: given[option] for option, key in names.items() if given.get(option) is not None}


def _integers(text: str, option: str, count: int) -> list[int]:
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"{option} {text!r}", expected=f"{count} whole numbers: 3,224,224")
    return [int(part) for part in parts]


def _floats(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}", expected="numbers: 0.5,0.5,0.5") from None
