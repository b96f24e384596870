"""The command ``init``: propose a recipe for the network and the images in a folder."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import progress
from compress.cli.arguments import MODELS, ImageSize
from compress.cli.contents import data_in, files_in, networks_in, weights_in
from compress.cli.options import Given, data_part
from compress.cli.output import print_result
from compress.errors import CompressError, DataError, ModelError, UsageError, absence
from compress.trust import agree, allow, allow_all

RECIPE = "compress.yaml"
SIDES = (224, 256, 128, 64, 32, 150, 299, 160, 192, 112, 96, 48, 28)  # tried on networks
NAME_IT = "Name it: --model FILE.py:NAME, torchvision:NAME, timm:NAME, ..."
PASSES = 20_000  # training images that an unknown job is given, over all epochs


@dataclass(frozen=True)
class Proposal:
    """What a recipe is written from."""

    model: str
    weights: str | None
    data: dict[str, Any]
    summary: str  # of the data
    images: int  # of train
    held_back: int  # images of validation
    task: str
    primary: str | None  # None where images have no labels
    tells_classes: bool
    targets: tuple[str, ...]
    keep_macs: float

    @property
    def batch_size(self) -> int:
        """A power of two, with at least sixteen steps an epoch where there are enough images."""
        return int(2 ** max(3, min(7, math.floor(math.log2(max(1, self.images / 16))))))

    @property
    def epochs(self) -> int:
        """Passes over the images: many over few."""
        return max(3, min(30, round(PASSES / max(1, self.images))))


def init(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Argument(help="Folder with the network, weights and images")
    ] = Path(),
    model: Annotated[
        str | None, typer.Option(help=f"Network: {MODELS} or FILE.onnx; searched for if absent")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weight file; searched for if absent")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images, KIND:PLACE, as imagefolder:photos, or with options, as "
            "masks:root=DIR,void=0; searched for if absent"
        ),
    ] = None,
    image_size: ImageSize = None,
    task: Annotated[str | None, typer.Option(help="Task; that of the data if absent")] = None,
    keep_macs: Annotated[
        float | None, typer.Option(help="Share of the MACs to keep; 0.5 if absent")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Runtimes; the installed ones if absent")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Recipe to write; FOLDER/compress.yaml if absent")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a recipe")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Take every proposal, ask nothing")] = False,
) -> None:
    """Write a commented recipe for the network and the images in a folder."""
    allow_all()  # it looks for networks in the folder that it is called in

    def ask(what: str, found: str) -> str:
        answer = str(typer.prompt(what, default=found or None, err=True))
        allow(answer)
        return answer

    print_result(write_recipe(ctx.params, None if yes or not sys.stdin.isatty() else ask))


def write_recipe(given: Given, ask: Callable[[str, str], str] | None) -> str:
    """Write a recipe for the network and images in a folder and return what was found and done.

    What is absent in ``given``, the options, is proposed. ``ask`` puts a question with the proposed
    answer to the user; None takes the proposals.

    Raises:
        UsageError: there is no network or no data to be found, or the recipe exists already.
        CompressError: network and data do not fit together, or the recipe cannot be run.
    """
    import yaml

    from compress.artifact import write_text
    from compress.pipeline.check import preflight
    from compress.recipe.loading import validate_recipe

    if not given["folder"].is_dir():
        raise UsageError(
            absence(given["folder"], "folder"),
            where=str(given["folder"]),
            expected="the folder where network, weights and images lie",
        )
    out = given["out"] or given["folder"] / RECIPE
    if out.exists() and not given["force"]:
        raise UsageError(f"{out} is there already", fix="Give another --out, or --force")
    proposal = propose(given, ask)
    text = recipe_text(proposal, out)
    preflight(validate_recipe(yaml.safe_load(text), where=str(out)), where=str(out))
    write_text(out, text)
    agree({"model": proposal.model})
    weights = f" with {proposal.weights}" if proposal.weights else ""
    return (
        f"network {proposal.model}{weights}\n{proposal.summary}\ntask {proposal.task}, targets "
        f"{', '.join(proposal.targets)}\n{out}: can be run. Read it, change it, then: "
        f"compress run {out}"
    )


def propose(given: Given, ask: Callable[[str, str], str] | None) -> Proposal:
    """Return the recipe's content from the options and what the folder holds."""
    from compress.pipeline.check import check_model
    from compress.tasks import default_task, load_task, primary_of

    folder = given["folder"]
    if given["model"] is not None:
        check_model(given["model"])  # before images are read
    chosen = dict(given)
    lying = None if given["data"] else _one(list(data_in(folder)))
    chosen["data"] = _answer(ask, "data", given["data"], lying, "--data KIND:PLACE")
    dataset, part = _data_of(data_part(chosen))
    files = [given["weights"]] if given["weights"] else list(weights_in(folder))
    found = given["model"] or _fitting(folder, files, dataset)
    if found is None:
        problem = _no_network(folder, files, dataset)
        if ask is None:
            raise problem
        progress.warn(str(problem))
    model = _answer(ask, "network", given["model"], found)
    weights = given["weights"] or _used(model, files, dataset)
    if given["image_size"] is None:
        dataset, part = _sized(model, weights, dataset, part)
    task = given["task"] or default_task(dataset.target)
    loaded = load_task(task, classes=dataset.classes)
    return Proposal(
        model=model,
        weights=weights,
        data=part,
        summary=dataset.summary(),
        images=len(dataset.splits["train"]),
        held_back=len(dataset.splits["validation"]),
        task=task,
        primary=primary_of(loaded).called if loaded.kinds else None,
        tells_classes=loaded.tells_classes,
        targets=tuple(given["target"] or _installed_runtimes()),
        keep_macs=float(
            given["keep_macs"] or _answer(ask, "share of the MACs to keep", None, "0.5")
        ),
    )


def _data_of(part: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return data and its part of the recipe, which leaves out boxes that are none."""
    from compress import plugins
    from compress.data import load_data
    from compress.recipe.settings import DataSettings

    try:
        return load_data(DataSettings(**part)), part
    except DataError as error:
        given = part.get("options", {})
        if "invalid" in given or "invalid" not in plugins.options("data", part["name"]):
            raise
        part = part | {"options": {**given, "invalid": "drop"}}
        dataset = load_data(DataSettings(**part))  # which raises what else is wrong
        progress.warn(
            f"{error.where}: {error.what}. The recipe leaves such boxes out (invalid: drop)."
        )
        return dataset, part


def _installed_runtimes() -> list[str]:
    from compress import plugins
    from compress.packages import is_installed
    from compress.runtimes import runtime_class

    known = plugins.names("runtimes")
    opening = [name for name in known if runtime_class(name).opens == "onnx"]
    return [name for name in opening if is_installed(runtime_class(name).package)]


def _answer(
    ask: Callable[[str, str], str] | None, what: str, told: Any, found: str | None, option: str = ""
) -> str:
    if told is not None:
        return str(told)
    if ask is not None:
        return ask(what, found or "")
    if found is None:
        raise UsageError(f"no {what} was found here", fix=f"Name it: {option}")
    return found


def _one(found: Sequence[str]) -> str | None:
    """Return the first of the data that was found; None if there is none."""
    first = next(iter(found), None)
    folders = [Path(each.partition(":")[2]) for each in found if each.startswith("imagefolder:")]
    beside = [each for each in folders[1:] if each.parent == folders[0].parent != folders[0]]
    if beside and first == f"imagefolder:{folders[0]}":
        raise UsageError(
            f"{first} and imagefolder:{beside[0]} both hold classes",
            expected="one set of images",
            fix=f"Name it: --data {first}, or --data imagefolder:{beside[0].parent} if its "
            "folders are the classes",
        )
    return first


def _fitting(folder: Path, weights: Sequence[str], dataset: Any) -> str | None:
    """Return the network that weights fit, or the first that can be built, or an ONNX file."""
    networks = list(networks_in(folder))
    for file in (*weights, None):
        for reference in networks:
            if _misfit(reference, file, dataset) is None:
                return reference
    return next(iter(files_in(folder, ".onnx")), None)


def _no_network(folder: Path, weights: Sequence[str], dataset: Any) -> UsageError:
    """Return what is missing: why networks here cannot be built, and code that weights are of."""
    from compress.models.weights import read_weights

    told = [str(_misfit(reference, None, dataset)) for reference in networks_in(folder)]
    del told[2:]  # the others most likely lack the same
    for file in weights[:2]:
        try:
            names = list(read_weights(Path(file)))
            told.append(
                f"{file} holds the weights of one, {len(names)} tensors from {names[0]} to "
                f"{names[-1]}, and not its code."
            )
        except CompressError as error:
            told.append(str(error))
    what = "no network was found here"
    return UsageError(f"{what}: {' '.join(told)}" if told else what, fix=NAME_IT)


def _used(model: str, weights: Sequence[str], dataset: Any) -> str | None:
    """Return the first weight file that ``model`` takes, and say which are not used, and why."""
    if model.endswith(".onnx"):
        return None
    reasons = {}
    if weights and (fault := _misfit(model, None, dataset)):
        raise fault  # of the network itself, and not of its weights
    for file in weights:
        reason = _misfit(model, file, dataset)
        if reason is None:
            others = [each for each in weights if each != file]
            if others:
                progress.warn(f"{file} is taken, not {', '.join(others)}: name others: --weights")
            return file
        reasons[file] = reason
    for reason in reasons.values():
        progress.warn(f"the weights that lie here are not used. {reason}")
    return None


def _misfit(reference: str, weights: str | None, dataset: Any) -> CompressError | None:
    """Return why ``reference`` cannot be built or does not take ``weights``; None if it does."""
    from compress.models import load_for

    try:
        load_for(len(dataset.classes), reference, weights)
    except CompressError as error:
        return error
    return None


def _sized(
    model: str, weights: str | None, dataset: Any, part: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return data and its part of the recipe in the size that the network takes."""
    from compress.data import load_data
    from compress.graph import files
    from compress.graph.shapes import dims_of, real_inputs
    from compress.recipe.settings import DataSettings

    wanted: tuple[int, int] | None
    if model.endswith(".onnx"):  # it fixes height and width, or leaves them free
        first = real_inputs(files.load(Path(model), weights=False))[0]
        height, width = [None, None, *dims_of(first)][-2:]
        wanted = (height, width) if height and width else None
    else:
        wanted = _torch_size(model, weights, dataset)
    if wanted is None or wanted == dataset.image_size:
        return dataset, part
    size: Any = wanted[0] if wanted[0] == wanted[1] else list(wanted)
    part = part | {"image_size": size}
    return load_data(DataSettings(**part)), part


def _torch_size(model: str, weights: str | None, dataset: Any) -> tuple[int, int] | None:
    """Return the data's own size if the network takes it, else the first usual one it takes.

    Small pictures are not enlarged. Of a network that resizes images inside it is the size that
    they have there.
    """
    import torch

    from compress.models import check_forward, load_for
    from compress.modules.detectors import size_inside

    network = load_for(len(dataset.classes), model, weights)
    own = tuple(dataset.image_size)
    for size in (*_lying(dataset), own, *((side, side) for side in SIDES)):
        with contextlib.suppress(ModelError):
            example = torch.zeros(1, dataset.channels, *size)
            check_forward(network, example)
            return size_inside(network, example) or size
    return None


def _lying(dataset: Any) -> Iterator[tuple[int, int]]:
    """Yield sizes for small pictures: theirs if all have one, and one that 32 divides."""
    from compress.data._images import stored_sides

    found = stored_sides(dataset.splits["train"])
    if not found:
        return
    height, width = (statistics.median(sides) for sides in zip(*found, strict=True))
    if len(set(found)) > 1:
        height = width = min(height, width)
    if min(height, width) >= min(dataset.image_size):
        return
    if len(set(found)) == 1:
        yield found[0]
    yield 32 * math.ceil(height / 32), 32 * math.ceil(width / 32)


def recipe_text(proposal: Proposal, out: Path) -> str:
    """Return the recipe as YAML with comments."""
    import yaml

    def flow(value: Any) -> str:
        text = str(yaml.safe_dump(value, default_flow_style=True, width=1000))
        return text.removesuffix("...\n").strip()

    model: dict[str, Any] = {"name": proposal.model}
    if proposal.weights:
        model["weights"] = proposal.weights
    data = proposal.data | {"batch_size": min(32, proposal.batch_size)}
    sized = " # that of its training, where that was another" if proposal.weights else ""
    lines = [
        f"# Written by compress init for {os.path.basename(os.getcwd())}.",
        f"#   compress check {out}      can it be run?",
        f"#   compress run {out}        carries it out; the same line goes on after a stop",
        "#   compress show stages/prune, stages/distill, ...: every option of a stage",
        f"model: {flow(model)}",
        f"# {proposal.summary}",
        "data:",
        *(f"  {key}: {flow(value)}{sized * (key == 'image_size')}" for key, value in data.items()),
        f"task: {flow(proposal.task)}",
        "seed: 0",
        "stages:",
        *_stages(proposal),
        "targets: # where it must run; compress doctor says what this machine has",
        *(
            f"  - {{runtime: {name}, precision: int8, batch: 1, when_installed: true}}"
            for name in proposal.targets
        ),
        *_gates(proposal.primary),
    ]
    return "\n".join(lines) + "\n"


def _gates(primary: str | None) -> Sequence[str]:
    if primary is None:
        return ["gates: {} # without labels nothing is lost that could be told; size_ratio: 3.0"]
    return [
        "gates: # compress run exits with 1 where one of these is missed",
        f"  metric_drop: 2.0 # largest loss of {primary}, in its unit",
        "  # size_ratio: 3.0 # the original's file over the result's",
    ]


def _stages(proposal: Proposal) -> Sequence[str]:
    samples = max(8, min(512, proposal.images // 5))
    quantize = [f"  - quantize: {{samples: {samples}}} # int8 ranges from so many images"]
    if proposal.model.endswith(".onnx"):
        return [
            "  # an ONNX file cannot be trained; give the network itself to prune it",
            *quantize,
        ]
    training = f"epochs: {proposal.epochs}, batch_size: {proposal.batch_size}, optimizer: adamw"
    flip = "" if proposal.task == "detection" else ", augment: {flip: true}"
    labelled = proposal.primary is not None
    if not proposal.weights and labelled:
        first = [
            "  # no weights were found: the network is trained first",
            f"  - train: {{{training}, lr: 0.001, weight_decay: 0.01{flip}}}",
        ]
    else:
        first = []
    after = "distill" if proposal.tells_classes or not labelled else "finetune"
    teacher = ", losses: [{kd: {temperature: 4.0}}]" if proposal.tells_classes else ""
    keep = ", keep: best" if not labelled and proposal.held_back else ""
    return [
        *first,
        f"  - prune: {{criterion: obs, keep_macs: {proposal.keep_macs:g}, round_to: auto}}",
        "  # the original teaches what is left of it" if after == "distill"
        else "  # trains what is left on the labels",
        f"  - {after}: {{{training}, lr: 0.0003{teacher}{flip}{keep}}}",
        *quantize,
    ]  # fmt: skip
