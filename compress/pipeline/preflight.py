"""Everything that can be known of a recipe short of running it: names, options, files, packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from compress import constructors, models, plugins
from compress.errors import CompressError, MissingPackageError, RecipeError
from compress.packages import is_installed
from compress.pipeline.purpose import prepared
from compress.runtimes import unavailable
from compress.settings import Recipe, Target
from compress.weights import is_weight_file


def preflight(recipe: Recipe, *, where: str, read_data: bool = True) -> None:
    """Check that ``recipe`` can be run on this machine.

    Args:
        recipe: The recipe. Nothing of it is carried out.
        where: What the messages begin with: the recipe's file.
        read_data: Also read the images; a run does that itself.

    Raises:
        RecipeError: it cannot; every problem is one line of the message.
    """
    problems = [f"{where}: {problem}" for problem in _problems(recipe, read_data)]
    if problems:
        raise RecipeError("\n".join(problems))


def _problems(recipe: Recipe, read_data: bool) -> Iterator[str]:
    yield from _complaint("model.name", partial(_check_model, recipe.model.name))
    weights = recipe.model.weights
    if weights is not None and is_weight_file(weights) and not Path(weights).is_file():
        yield f"model.weights: no such file {weights!r}."
    if read_data:
        yield from _data_problems(recipe)
    for number, stage in enumerate(recipe.stages):
        for key, kind in (
            ("criterion", "criteria"),
            ("losses", "losses"),
            ("observer", "observers"),
        ):
            given = getattr(stage.settings, key, None)
            for each in given if isinstance(given, tuple) else [given]:
                if each is not None:
                    place = f"stages[{number}].{stage.verb}.{key}"
                    yield from _complaint(place, partial(plugins.create, kind, each))
    for number, target in enumerate(recipe.targets):
        yield from _complaint(f"targets[{number}]", partial(_check_target, target))


def _data_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the images, or with their labels for the recipe's task."""
    try:
        prepared(recipe)
    except RecipeError as error:
        yield from str(error).splitlines()
    except CompressError as error:
        yield f"data: {error}"


def _complaint(place: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except CompressError as error:
        yield f"{place}: {error}"


def _check_model(reference: str) -> None:
    if models.is_onnx(reference):
        if not Path(reference).is_file():
            raise RecipeError(f"no such file {reference!r}")
    elif models.model_folder(Path(reference)) is None:
        constructors.check(reference)


def _check_target(target: Target) -> None:
    """Check that the runtime is installed; a runtime and its package are called alike."""
    package = target.runtime.replace("-", "_")
    if target.when_installed or target.runtime == "pytorch" or is_installed(package):
        return
    raise MissingPackageError(unavailable(target.runtime) or f"{package} is not installed")
