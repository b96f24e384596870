"""Verbs as recipes of one stage, and recipes: all of them go through the one pipeline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.options import INPUT_SIZE, Given, chosen, data_part, integers, present
from compress.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.recipe.settings import Recipe
    from compress.report import Report

    Done = tuple[Report, Path]  # and the folder that it lies in

logger = logging.getLogger(__name__)

DROP_PCT = 1.0  # of the metric that one group may cost alone, where a sensitivity is the budget
TRAINING = {"epochs": "epochs", "batch_size": "batch_size"}  # options of every training
DEFAULT_RUNTIME = "onnxruntime"  # written out: runtimes are not imported to parse options
DEFAULT_TARGETS = ({"runtime": DEFAULT_RUNTIME, "precision": "fp32"},)


def run(
    recipe: Path, out: Path | None, overrides: Sequence[str], *, fresh: bool, track: str | None
) -> Done | None:
    """Carry out a recipe; see ``pipeline.run``."""
    from compress.recipe.loading import load_recipe

    chosen = _agreed(load_recipe(recipe, overrides), str(recipe))
    return _run(_tracked(chosen, track), out, fresh=fresh)


def dry_run(recipe: Path, overrides: Sequence[str], track: str | None) -> str:
    """Return the recipe as it would be run, with every default, after all checks."""
    from compress.pipeline.check import preflight
    from compress.recipe.loading import dump, load_recipe

    resolved = _tracked(_agreed(load_recipe(recipe, overrides), str(recipe)), track)
    preflight(resolved, where=str(recipe))
    return dump(resolved)


def check(recipes: Sequence[Path], overrides: Sequence[str]) -> str:
    """Check recipes without running them; one error lists the problems of all of them."""
    from compress.pipeline.check import preflight
    from compress.recipe.loading import load_recipe

    problems = []
    for path in recipes:
        try:
            preflight(_agreed(load_recipe(path, overrides), str(path)), where=str(path))
        except (RecipeError, UsageError) as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    return "\n".join(f"{path}: can be run" for path in recipes)


def train(given: Given) -> Done | None:
    """Run a recipe of one training."""
    return _verb("train", given, [{"train": present(given, **TRAINING)}])


def prune(given: Given) -> Done | None:
    """Run a recipe that prunes, and then trains if epochs are given."""
    shares = ("keep_macs", "keep_params", "keep_latency")
    names = (*shares, "latency_ms", "runtime", "round_to")
    cut = present(given, **{name: name for name in names}) | chosen(given, criterion="criterion")
    if given["outputs"] is not None:
        cut["outputs"] = given["outputs"].split(",")
    if given["keep_channels"] is not None:
        cut["keep_channels"] = _keep_channels(given["keep_channels"], given["max_drop"])
    elif given["max_drop"] is not None:
        raise UsageError(
            "--max-drop says how to read a sensitivity, and none is given",
            fix="Add --keep-channels FILE, made by compress sensitivity --prune --json",
        )
    if not {*shares, "keep_channels", "latency_ms"} & cut.keys():
        cut["keep_macs"] = 0.5
    targets = [{"runtime": given["runtime"] or DEFAULT_RUNTIME, "precision": "fp32"}]
    return _verb("prune", given, [{"prune": cut}, *_training_after(given)], targets)


def sparsify(given: Given) -> Done | None:
    """Run a recipe that zeroes single weights, and then trains if epochs are given."""
    zero = present(given, keep_weights="keep_weights", pattern="pattern", criterion="criterion")
    return _verb("sparsify", given, [{"sparsify": zero}, *_training_after(given)])


def distill(given: Given) -> Done | None:
    """Run a recipe of one distillation."""
    learn = present(given, teacher="teacher", teacher_weights="teacher_weights", **TRAINING)
    learn |= chosen(given, loss="losses")
    return _verb("distill", {**given, "model": given["student"]}, [{"distill": learn}])


def quantize(given: Given) -> Done | None:
    """Run a recipe that writes int8 graphs."""
    settings = present(given, method="method", samples="samples", max_drop="max_drop")
    settings |= chosen(given, observer="observer")
    if given["qat_epochs"]:
        settings["qat"] = {
            "epochs": given["qat_epochs"], "lr": 1e-3, **present(given, batch_size="batch_size")
        }  # fmt: skip
    targets = [_int8_target(name) for name in given["target"] or [DEFAULT_RUNTIME]]
    return _verb("quantize", given, [{"quantize": settings}], targets)


def summary(done: Done) -> RenderableType:
    """Return what is printed after a run: tables, gates, verdict, where the files are."""
    from compress.report import summary as summarized

    return summarized(*done)


def content(
    given: Given, name: str, stages: Sequence[Given], targets: Sequence[Given] = DEFAULT_TARGETS
) -> dict[str, Any]:
    """Return the recipe that the options of a verb stand for, as it would be in YAML."""
    model = {"name": given["model"]}
    model |= present(given, weights="weights", num_classes="num_classes")
    if given.get("input_size") is not None:
        model["input_size"] = integers(
            given["input_size"], "--input-size", count=3, like=INPUT_SIZE
        )
    if given.get("trust"):
        model["options"] = {"trust": True}
    return present(given, task="task") | {
        "name": name,
        "model": model,
        "data": data_part(given),
        "seed": given["seed"],
        "stages": list(stages),
        "targets": list(targets),
    }


def _training_after(given: Given) -> list[dict[str, Any]]:
    """Return the stage that ``--epochs`` and ``--teacher`` ask for, if they do."""
    after = present(given, teacher="teacher", **TRAINING)
    if after.get("epochs"):
        return [{"distill" if "teacher" in after else "finetune": after}]
    if "teacher" in after:
        raise UsageError("a teacher without training", fix="Say how long: --epochs N")
    return []


def _keep_channels(text: str, max_drop: float | None) -> float | dict[str, float]:
    """Return a share, or the share of each group that a sensitivity file allows."""
    from compress.artifact import read_json
    from compress.prune.sensitivity import PruneSensitivity

    try:
        return float(text)
    except ValueError:
        pass
    if not Path(text).is_file():
        raise UsageError(
            f"--keep-channels {text!r}: is no number and no file",
            expected="a share such as 0.5, or what compress sensitivity --prune --json wrote",
        )
    found = PruneSensitivity.from_json(read_json(Path(text)))
    shares = found.keep_channels(DROP_PCT if max_drop is None else max_drop)
    if all(share == 1 for share in shares.values()):
        raise UsageError(
            f"--keep-channels {text}: no group can be cut without losing more",
            where=f"--max-drop {DROP_PCT if max_drop is None else max_drop:g}",
            fix="Allow more: --max-drop",
        )
    return shares


def _verb(
    name: str,
    given: Given,
    stages: Sequence[Given],
    targets: Sequence[Given] = DEFAULT_TARGETS,
) -> Done | None:
    """Run the recipe of one verb: the same pipeline, run folder and report as any other."""
    from compress.recipe.loading import apply_override, validate

    written = content(given, name, stages, targets)
    for override in given["overrides"] or []:
        apply_override(written, override)
    recipe = validate(written, where=f"compress {name}")
    return _run(_tracked(recipe, given["track"]), given["out"], fresh=given["fresh"])


def _agreed(recipe: Recipe, where: str) -> Recipe:
    """Return a recipe whose code the user agreed to run; it is listed before any of it runs.

    Raises:
        UsageError: there is code in it that nobody agreed to.
    """
    from compress import trust
    from compress.recipe.loading import to_json

    try:
        told = trust.check_recipe(to_json(recipe))
    except UsageError as error:
        raise error.within(where) from None
    if told:
        logger.warning("%s: %s", where, told)
    return recipe


def _tracked(recipe: Recipe, tracker: str | None) -> Recipe:
    from compress.recipe.loading import tracked

    return recipe if tracker is None else tracked(recipe, tracker)


def _run(recipe: Recipe, out: Path | None, *, fresh: bool) -> Done | None:
    from compress import pipeline
    from compress.report.run_folder import default_folder

    folder = out or default_folder(recipe)
    report = pipeline.run(recipe, folder, fresh=fresh)
    return None if report is None else (report, folder)


def _int8_target(name: str) -> dict[str, Any]:
    """Return where the graph for ``name`` is run: of the runtimes that take it, one installed."""
    from compress import plugins
    from compress.packages import is_installed
    from compress.runtimes import facts

    known = plugins.names("runtimes")
    if name not in known or is_installed(facts(name).package):
        return {"runtime": name, "precision": "int8"}
    others = [each for each in known if each != name and facts(each).int8_form == name]
    return {
        "runtime": next(iter(others), name),
        "precision": "int8",
        "when_installed": bool(others),
    }
