"""Check a recipe without running it: names, options, files, packages; each stage, for seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from compress import artifact, evaluate, models, plugins, progress, prune
from compress.data import Dataset
from compress.errors import CompressError, MissingPackageError, ModelError, RecipeError, absence
from compress.evaluate.feeding import Fed
from compress.graph.model import GraphIndex
from compress.graph.preprocess import prepare, read_onnx
from compress.models import references
from compress.models.weights import is_weight_file
from compress.modules.detectors import size_inside
from compress.packages import is_installed, require
from compress.pipeline import cautions
from compress.pipeline.context import ONNX_FILE, export_network
from compress.pipeline.stages.prune import outputs_read
from compress.pipeline.task import build_original, load_teacher, prepared
from compress.quantize.api import check_method, excluded_nodes
from compress.recipe.loading import PLUGIN_KEYS
from compress.recipe.settings import (
    PruneSettings,
    QuantizeSettings,
    Recipe,
    Stage,
    Target,
    TrainSettings,
)
from compress.runtimes import open_session, runtime_class, unavailable
from compress.tasks import Task
from compress.train.distill.build import check_objective
from compress.train.distill.objective import loss_of
from compress.train.loop import check_validation
from compress.train.optimizers import check_layer

LAYER_KEYS = ("freeze_until", "layer_lr", "exclude")  # settings that name layers of the network


def preflight(recipe: Recipe, *, where: str, read_data: bool = True) -> None:
    """Check that ``recipe`` can be run on this machine; nothing of it is carried out.

    Messages begin with ``where``, its file. Without ``read_data`` images are left to the run.

    Raises:
        RecipeError: it cannot; every problem is one line of the message.
    """
    problems = list(_problems(recipe))
    if read_data:
        problems += _data_problems(recipe, has_network=not problems)
    _refuse(problems, where)


def prepared_data(recipe: Recipe, *, where: str) -> tuple[Dataset, Task]:
    """Return the images of ``recipe``, and what its network is for.

    Raises:
        RecipeError: the recipe contradicts them; every problem is one line of the message.
        CompressError: the images cannot be read.
    """
    try:
        return prepared(recipe)
    except RecipeError as error:
        _refuse(str(error).splitlines(), where)
        raise


def try_network(recipe: Recipe, dataset: Dataset, task: Task, *, where: str) -> None:
    """Build the network of ``recipe`` and run it on one image of its data, before any stage.

    Raises:
        RecipeError: it does not fit the data or the task, or has no layer that a setting names.
    """
    _refuse(list(_network_problems(recipe, dataset, task)), where)


def _refuse(problems: Sequence[str], where: str) -> None:
    if problems:
        raise RecipeError("\n".join(f"{where}: {one}" if where else one for one in problems))


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _complaint("model.name", partial(check_model, recipe.model.name))
    yield from _missing_weights("model.weights", recipe.model.weights)
    for key in ("weights", "num_classes") if _is_onnx_file(recipe) else ():
        if getattr(recipe.model, key) is not None:
            yield (
                f"model.{key}: changes nothing in the ONNX file {recipe.model.name}, which holds "
                "its network and weights. Leave it out."
            )
    images = {recipe.data.name: recipe.data.options}
    yield from _complaint("data.options", partial(plugins.read_reference, "data", images))
    if recipe.task is not None:
        yield from _complaint("task", partial(plugins.read_reference, "tasks", recipe.task))
    for place, stage in recipe.placed_stages():
        yield from _stage_problems(recipe, stage, place)
        for key, kind in PLUGIN_KEYS.items():
            given = getattr(stage.settings, key, None)
            create = loss_of if kind == "losses" else partial(plugins.create, kind)
            for each in given if isinstance(given, tuple) else [given]:
                if each is not None:
                    yield from _complaint(f"{place}.{key}", partial(create, each))
    if recipe.measure.explain_images and not is_installed("captum"):
        need = partial(require, "captum", extra="explain", purpose="attribution")
        yield from _complaint("measure.explain_images", need)
    for number, target in enumerate(recipe.targets):
        yield from _complaint(f"targets[{number}]", partial(_check_target, target))


def _is_onnx_file(recipe: Recipe) -> bool:
    """Return whether the network is an ONNX file that is there; of others that alone is said."""
    return models.is_onnx(recipe.model.name) and Path(recipe.model.name).is_file()


def _stage_problems(recipe: Recipe, stage: Stage, place: str) -> Iterator[str]:
    """Yield what is wrong with the names in a stage, and what it asks of an ONNX file."""
    if _is_onnx_file(recipe) and stage.quantize is None:
        yield (
            f"{place}: needs a network whose weights PyTorch can change; model.name is the ONNX "
            f"file {recipe.model.name}. Give the network that it was exported from; an ONNX file "
            "can be quantized, built, measured, compared and checked."
        )
    if stage.prune is not None and (stage.prune.keep_latency or stage.prune.latency_ms):
        yield from _complaint(f"{place}.runtime", partial(_check_timing, stage.prune.runtime))
    if stage.quantize is not None:
        yield from _complaint(f"{place}.method", partial(check_method, stage.quantize.method))
        if stage.quantize.data is not None:
            images = {stage.quantize.data.name: stage.quantize.data.options}
            check = partial(plugins.read_reference, "data", images)
            yield from _complaint(f"{place}.data", check)
    if stage.distill is not None and stage.distill.teacher is not None:
        teacher, weights = stage.distill.teacher, stage.distill.teacher_weights
        yield from _complaint(f"{place}.teacher", partial(check_model, teacher))
        yield from _missing_weights(f"{place}.teacher_weights", weights)


def _missing_weights(place: str, weights: str | None) -> Iterator[str]:
    if weights is not None and is_weight_file(weights) and not Path(weights).is_file():
        yield f"{place}: {ModelError(absence(weights), where=weights, expected='a weight file')}"


def _data_problems(recipe: Recipe, *, has_network: bool) -> Iterator[str]:
    """Yield what is wrong with the images, with their labels for the task, or with the network."""
    try:
        dataset, task = prepared(recipe)
    except RecipeError as error:
        yield from str(error).splitlines()
    except CompressError as error:
        yield f"data: {error}"
    else:
        yield from _network_problems(recipe, dataset, task) if has_network else ()


def _network_problems(recipe: Recipe, dataset: Dataset, task: Task) -> Iterator[str]:
    """Yield what is wrong with the network of ``recipe``, tried on one image of its data."""
    try:
        if models.is_onnx(recipe.model.name):
            _try_onnx(recipe, dataset, task)
            return
        model = build_original(recipe, dataset, task)
    except CompressError as error:
        yield f"model: {error}"
        return
    for line in cautions.of_size(dataset, size_inside(model, dataset.example)):
        progress.warn(line)  # before anything that takes long
    for key, name in _layers_named(recipe):
        try:
            check_layer(model, name, key)
        except CompressError as error:
            yield str(error)
    for place, part in recipe.parts():
        if isinstance(part, TrainSettings):
            yield from _complaint(place, partial(check_validation, dataset, part))
    for place, stage in recipe.placed_stages():
        yield from _complaint(place, partial(try_stage, stage, model, dataset, task))


def _layers_named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for place, part in recipe.parts():
        for key in () if hasattr(part, "observer") else LAYER_KEYS:  # whose names are ONNX nodes
            value = getattr(part, key, None)
            for name in [value] if isinstance(value, str) else value or ():
                yield f"{place}.{key}", name


def _try_onnx(recipe: Recipe, dataset: Dataset, task: Task) -> None:
    """Run an ONNX file on one image, as the stages after it would."""
    for stage in recipe.stages:
        if stage.quantize is not None:
            try_nodes(Path(recipe.model.name), stage.quantize)
    with open_session(Path(recipe.model.name)) as session:
        fed, one = Fed(session, dataset), dataset.pictures("test", 1, 1)
        if not task.tells_classes:
            evaluate.check_task(fed, task, dataset, images=1)
            return
        found = evaluate.predict(fed, one).logits.shape[1]
    if found != len(dataset.classes):
        raise ModelError(
            f"has {found} class outputs, the data has {len(dataset.classes)}",
            where=recipe.model.name,
            expected="a network that was trained for the classes of the data",
        )


def _complaint(place: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except CompressError as error:
        yield f"{place}: {error}"


def check_model(reference: str) -> None:
    """Check that ``reference`` names a network, without building it.

    Raises:
        CompressError: it does not.
    """
    if models.is_onnx(reference):
        if not Path(reference).is_file():
            raise RecipeError(absence(reference), where=reference, expected="an ONNX file")
    elif models.model_folder(Path(reference)) is None:
        references.check_reference(reference)


def _check_target(target: Target) -> None:
    """Check that the runtime is installed, has its options, and runs int8 graphs if it is to."""
    plugins.create("runtimes", target.reference)
    package = runtime_class(target.runtime).package
    if target.precision == "int8" and runtime_class(target.runtime).int8_form is None:
        known = [name for name in plugins.names("runtimes") if runtime_class(name).int8_form]
        raise RecipeError(
            f"{target.runtime} runs no int8 graph",
            expected=f"one of: {', '.join(known)}",
            fix="Ask it for precision fp32, or leave the target out",
        )
    if not target.when_installed and not is_installed(package):
        raise MissingPackageError(unavailable(target.runtime) or f"{package} is not installed")


def _check_timing(runtime: str) -> None:
    if reason := unavailable(runtime):
        raise RecipeError(
            f"nothing can be timed on {runtime}: {reason}",
            fix="Prune to keep_macs, or where that runtime is",
        )


CHEAP = "l1"  # a criterion that looks at weights alone
WHOLE = {"keep_channels": 1.0}  # the budget in place of a latency, which would take minutes


def try_stage(stage: Stage, model: nn.Module, dataset: Dataset, task: Task) -> None:
    """Try a stage on the network that the recipe begins with, which is left as found.

    Raises:
        CompressError: the stage would refuse the network or its settings.
    """
    if stage.prune is not None:
        _try_cut(stage.prune, model, dataset, task)
    elif stage.distill is not None:
        teacher = load_teacher(stage.distill, dataset) or model
        check_objective(model, teacher, dataset, stage.distill, task)
    elif stage.quantize is not None and stage.quantize.exclude:
        with artifact.scratch() as folder:
            export_network(model, dataset, task, folder / ONNX_FILE)
            try_nodes(folder / ONNX_FILE, stage.quantize)


def try_nodes(path: Path, settings: QuantizeSettings) -> None:
    """Prepare an ONNX file for int8, and find the nodes that are to stay in float.

    Raises:
        CompressError: it cannot be quantized, or has no such node.
    """
    excluded_nodes(GraphIndex(prepare(read_onnx(path), str(path))), settings.exclude)


def _try_cut(settings: PruneSettings, model: nn.Module, dataset: Dataset, task: Task) -> None:
    """Plan the first cut by a cheap criterion: whether there is a plan depends on no score."""
    example = dataset.example
    budget = prune.one_budget(**{name: getattr(settings, name) for name in prune.BUDGETS})
    is_timed = budget.kind in ("latency", "latency_ms")
    prune.plan_pruning(
        model,
        example,
        **WHOLE if is_timed else budget.in_round(1, settings.rounds, None).to_json(),
        criterion=CHEAP,
        round_to=settings.round_to,
        min_channels=settings.min_channels,
        max_cut=settings.max_cut,
        exclude=settings.exclude,
        outputs=outputs_read(task, model, example, settings)["outputs"],
    )
    if settings.refit_steps:
        prune.check_blocks(model, example)
