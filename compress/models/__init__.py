"""References to networks: build them, load weights without pickled code, save and reload them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import artifact
from compress.errors import ModelError, PlanError, UsageError
from compress.groups.plan import PrunePlan
from compress.groups.proof import apply_pruning
from compress.models.references import (
    class_option,
    classifier_layers,
    construct,
    count_of,
    described,
)
from compress.models.weights import (
    aligned,
    fit,
    is_weight_file,
    of_other_classes,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from compress.modules import full_copy, memory_format_of, network_of, set_mode, with_gradients
from compress.modules.detectors import check_detector, check_rows, on_batch
from compress.modules.inputs import copied
from compress.modules.outputs import logits_of

SCHEMA = 1
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
PLAN_FILE = "plan.json"
SIDES = (2, 4, 8, 16, 32, 64)  # what networks that halve an image several times divide it by


def is_onnx(reference: str | Path) -> bool:
    """Return whether ``reference`` names an ONNX file."""
    return str(reference).endswith(".onnx")


def load_model(
    reference: str | Path,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Return the network that ``reference`` names, in eval mode on the CPU.

    Args:
        reference: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``,
            ``path/file.py:factory``, or a folder that a run or ``save_model`` wrote.
        weights: A weight file, or the name of weights that torchvision or timm publish (these are
            downloaded, as they were asked for by name). Random weights if absent.
        num_classes: Outputs of the classifier; the constructor's default if absent.
        options: Further keyword arguments of the constructor.
        new_head: Leave the classifier's random weights as they are: ``weights`` are of a network
            for other classes, and this one is going to be trained.

    Raises:
        UsageError: the reference is of no known form.
        ModelError: the network cannot be built, or the weights do not fit.
    """
    _check_given(reference, weights, num_classes)
    text = str(reference)
    folder = model_folder(Path(text))
    if folder is not None:
        model = _load_saved(folder, num_classes)
    elif is_onnx(text):
        raise ModelError(
            "an ONNX file is not a network that can be trained or pruned",
            where=text,
            fix="Use it with quantize, build, bench, compare or lint",
        )
    else:
        published = weights is not None and not is_weight_file(weights)
        model = construct(
            text, num_classes, options or {}, published=str(weights) if published else None
        )
        if published:
            weights = None
    if weights is not None:
        state = aligned(read_weights(Path(weights)), model)
        kept = _head_of(model, state) if new_head else {}
        fit(model, {**state, **kept}, where=str(weights))
    set_mode(model, training=False)
    return model


def _check_given(reference: object, weights: object, num_classes: object) -> None:
    """Raise UsageError where an argument of ``load_model`` is of a type that it cannot read."""
    if not isinstance(reference, str | Path):
        raise UsageError(
            f"{type(reference).__name__} is no reference to a network",
            expected="a text such as torchvision:NAME or path/file.py:factory, or a folder",
            fix="A network that is built already needs no loading",
        )
    if weights is not None and not isinstance(weights, str | Path):
        raise UsageError(
            f"weights is of type {type(weights).__name__}",
            expected="a file, or the name of published weights",
            fix="A state dict goes into the network that is returned: model.load_state_dict(...)",
        )
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise UsageError(
            f"num_classes is {num_classes!r}",
            expected="a whole number; 0 for a network of timm without its classifier",
        )


def load_for(
    classes: int,
    reference: str,
    weights: str | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """Return the network that ``reference`` names, for data of ``classes`` classes.

    The count, unless 0, is given to a constructor that takes it and was not told ``num_classes``;
    other arguments are those of ``load_model``.
    """
    if num_classes is None and classes and class_option(reference):
        num_classes = count_of(reference, classes)
    return load_model(reference, weights, num_classes, **options)


def check_forward(model: nn.Module, example: Tensor) -> tuple[int, ...]:
    """Return the shape of the output for ``example`` (B, C, H, W); a copy runs.

    Raises:
        ModelError: the forward pass fails, the message says with what; or it returns boxes after
            NMS, so many for each image, which can be neither cut nor exported.
    """
    network = network_of(model)
    check_detector(type(network), type(model).__name__)
    twin = on_batch(full_copy(network), (example,), {})
    set_mode(twin, training=False)
    try:
        with torch.inference_mode():
            output = twin(copied(example))
    except Exception as error:
        shape = tuple(example.shape)
        raise ModelError(
            f"its forward pass fails on an input of shape {shape}: {error}",
            where=type(model).__name__,
            fix=_fitting_size(twin, example)
            or "Check the image size and channels of the data against what the network expects",
        ) from error
    check_rows(output, type(model).__name__)
    return tuple(logits_of(output).shape)


def _fitting_size(model: nn.Module, example: Tensor) -> str:
    """Return advice where ``model`` takes images of the next multiple of a power of two."""
    size = example.shape[2:]
    for step in SIDES if len(size) == 2 else ():
        height, width = (-(-side // step) * step for side in size)
        if (height, width) == tuple(size):
            continue
        with contextlib.suppress(Exception), torch.inference_mode():
            model(example.new_zeros(1, example.shape[1], height, width))
            return (
                f"It runs at {height} x {width}, multiples of {step}: set data.image_size or "
                f"--image-size {height},{width}"
            )
    return ""


def check_classes(model: nn.Module, example: Tensor, classes: int) -> None:
    """Check that ``model`` gives one output for each of ``classes``.

    Raises:
        ModelError: it does not, or its forward pass fails.
    """
    shape = check_forward(model, example)
    if len(shape) != 2 or shape[1] != classes:
        raise ModelError(
            f"the network's output has shape {shape} and the data has {classes} classes",
            expected=f"an output of shape (batch, {classes})",
            fix="Set num_classes, or use the data that the network was trained for",
        )


@with_gradients()
def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    reference: str | Path,
    plan: PrunePlan | None = None,
    num_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Save ``model`` as its constructor's reference, its pruning plan and its weights; no pickle.

    Args:
        model: The network, in a wrapper or not; pruned by ``plan`` if there is one. It is left as
            found.
        folder: Where ``model.json``, ``model.safetensors`` and ``plan.json`` are written.
        reference: What the network was built from. If this is a folder of an earlier
            ``save_model``, its plan and the new one are joined.
        plan: The pruning plan that made ``model`` out of ``reference``.
        num_classes: As given to the constructor; found out from the weights if absent.
        options: As given to the constructor.

    Raises:
        ModelError: ``reference`` and ``plan`` do not give a network of these shapes; it is rebuilt
            and loaded in memory before a file is written.
    """
    folder, model = Path(folder), network_of(model)
    description, earlier = _description(reference, num_classes, options or {})
    joined = plan if earlier is None else earlier if plan is None else earlier.then(plan)
    state = _state_of(model)
    with torch.random.fork_rng(devices=[]):
        description["num_classes"] = _checked_classes(state, description, joined)
    if joined is not None:
        joined.save(folder / PLAN_FILE)
    if any(memory_format_of(p) is torch.channels_last for p in model.parameters()):
        description["memory_format"] = "channels_last"
    write_safetensors(folder / WEIGHTS_FILE, state)
    description |= {"pruned": joined is not None, "beside": _beside(description, folder)}
    artifact.write_json(folder / DESCRIPTION_FILE, description)
    return folder


def model_folder(path: Path) -> Path | None:
    """Return ``path`` if a network is saved in it, or the last stage of a run that has one."""
    if (path / DESCRIPTION_FILE).is_file():
        return path
    stages = sorted(path.glob(f"[0-9][0-9]-*/{DESCRIPTION_FILE}")) if path.is_dir() else []
    return stages[-1].parent if stages else None


def _load_saved(folder: Path, num_classes: int | None = None) -> nn.Module:
    """Return the network saved in ``folder``; ``num_classes``, if given, has to be its own."""
    description, plan = _read_description(folder)
    classes = description["num_classes"] if num_classes is None else num_classes
    model = _rebuild(description, plan, classes)
    path = folder / WEIGHTS_FILE
    _fill(model, read_safetensors(path), plan, where=str(path))
    if description.get("memory_format") == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    return model


def _fill(
    model: nn.Module, state: Mapping[str, Tensor], plan: PrunePlan | None, *, where: str
) -> None:
    """Load ``state`` into a rebuilt network, with buffers that its forward has replaced.

    A forward may give a buffer another shape, or make one out of None (a cache of positions): such
    a buffer is part of the network as it was saved. Those that the plan cuts are not free.
    """
    own, cut = model.state_dict(), plan.tensors if plan is not None else {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for key, value in state.items():
        place, _, name = key.rpartition(".")
        fits = key in own and own[key].shape == value.shape
        if fits or key in parameters or key in cut or place not in modules:
            continue
        if name in modules[place]._buffers:
            modules[place]._buffers[name] = value.clone()
    fit(model, state, where=where)


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``model`` by name, on the CPU."""
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"its state holds a {type(value).__name__} under {key!r}",
                where=type(model).__name__,
                expected="tensors only, which are read back without running code",
            )
        found[key] = value.detach().cpu().contiguous()
    return found


def _rebuild(
    description: Mapping[str, Any], plan: PrunePlan | None, num_classes: int | None
) -> nn.Module:
    model = construct(description["reference"], num_classes, description["options"])
    return model if plan is None else apply_pruning(model, plan)


def _description(
    reference: str | Path, num_classes: int | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], PrunePlan | None]:
    folder = model_folder(Path(reference))
    if folder is not None:
        return _read_description(folder)
    named, told = described(str(reference), options)
    file, _, factory = named.rpartition(":")
    fresh = {
        "schema": SCHEMA,
        "reference": f"{Path(file).resolve()}:{factory}" if file.endswith(".py") else named,
        "num_classes": num_classes,
        "options": told,
    }
    return fresh, None


def _read_description(folder: Path) -> tuple[dict[str, Any], PrunePlan | None]:
    path = folder / DESCRIPTION_FILE
    description = artifact.read_json(path)
    if description.get("schema") != SCHEMA:
        raise ModelError(
            f"was written in format {description.get('schema')!r}",
            where=str(path),
            expected=f"format {SCHEMA}",
        )
    file, _, factory = description["reference"].rpartition(":")
    moved = description.get("beside")
    if moved and not Path(file).is_file() and (folder / moved).is_file():
        description["reference"] = f"{(folder / moved).resolve()}:{factory}"
    return description, PrunePlan.load(folder / PLAN_FILE) if description["pruned"] else None


def _beside(description: Mapping[str, Any], folder: Path) -> str | None:
    """Return where the file of the constructor lies from ``folder``: both may move together."""
    file = description["reference"].rpartition(":")[0]
    if not file.endswith(".py"):
        return None
    return Path(os.path.relpath(file, folder.resolve())).as_posix()


def _checked_classes(
    state: Mapping[str, Tensor], description: Mapping[str, Any], plan: PrunePlan | None
) -> int | None:
    """Return the ``num_classes`` with which reference, plan and ``state`` give the network again.

    The network is rebuilt and ``state`` loaded into it: what is saved can be loaded.
    """
    given, reasons = description["num_classes"], []
    candidates = [given] if given is not None else _class_counts(state, description, plan)
    for classes in candidates:
        try:
            _fill(_rebuild(description, plan, classes), state, plan, where="")
        except (ModelError, PlanError) as error:
            reasons.append(str(error))
            continue
        return classes
    raise ModelError(
        f"the reference and the plan do not give a network of these shapes: {reasons[0]}",
        where=description["reference"],
        fix=_missing_link(state, description, plan, given),
    )


def _class_counts(
    state: Mapping[str, Tensor], description: Mapping[str, Any], plan: PrunePlan | None
) -> list[int | None]:
    """Return the ``num_classes`` that may give these shapes, the constructor's default first."""
    cut = plan.tensors if plan is not None else {}
    default = construct(description["reference"], None, description["options"]).state_dict()
    counts = {
        value.shape[0]
        for key, value in state.items()
        if key in default and value.ndim and 0 not in cut.get(key, {})
        if value.shape[0] != default[key].shape[0]
    }
    return [None, *sorted(counts)]


def _missing_link(
    state: Mapping[str, Tensor],
    description: Mapping[str, Any],
    plan: PrunePlan | None,
    classes: int | None,
) -> str:
    """Return what to give to ``save_model`` for a network that its arguments do not lead to."""
    if plan is not None and all(
        tuple(state[name].shape) == shape for name, shape in plan.shapes.items() if name in state
    ):
        return "This network is not pruned: save what apply_pruning returned, or leave plan out"
    whole = construct(description["reference"], classes, description["options"]).state_dict()
    smaller = [
        key
        for key, value in state.items()
        if key in whole and value.ndim == whole[key].ndim and value.numel() < whole[key].numel()
    ]
    if len(smaller) > 2 and plan is None:
        return "It has fewer channels than the reference: give plan=, the plan that it was cut by"
    if len(smaller) > 2:
        return "Give the plan that this network was cut by, and num_classes and options"
    return "Give the num_classes and options that the network was built with"


def _head_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that ``model`` keeps: of other classes, else of its classifier."""
    own = model.state_dict()
    heads = of_other_classes(own, state)
    if heads:
        return heads
    names = classifier_layers(model)
    return {k: v for k, v in own.items() if k.rpartition(".")[0] in names}
