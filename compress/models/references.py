"""References to networks in code: torchvision, timm, a module or a file of the user's."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from compress.errors import (
    CompressError,
    ModelError,
    UnknownNameError,
    UsageError,
    absence,
    nearest,
)
from compress.models.weights import ENDINGS, of_other_classes
from compress.modules.detectors import check_detector
from compress.packages import require
from compress.plugins import import_file
from compress.trust import check_code, is_limited

_ULTRALYTICS = {  # the class of each of their tasks
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "classify": "ClassificationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
}


CLASS_OPTIONS = ("num_classes", "classes", "n_classes", "num_labels", "nc")  # the likeliest first
_WITH_BACKGROUND = ("ssd", "fasterrcnn_")  # names of torchvision's detectors
_DETECTORS = (*_WITH_BACKGROUND, "retinanet_", "fcos_")

# Modules that networks were in: recipes and run folders written then name them.
FORMER_NAMES = {
    "compress.models.restoration": "compress.models.cifar",
    "compress.detector": "compress.models.detector",
    "compress.networks": "compress.models.cifar",
}


def class_option(reference: str) -> str | None:
    """Return which argument of the constructor of ``reference`` is the number of classes.

    None if none is, or ``reference`` is a folder, which holds its constructor's arguments.
    """
    scheme, _, _ = reference.partition(":")
    if scheme in {"torchvision", "timm", "ultralytics"}:
        return CLASS_OPTIONS[0]
    return _class_option(_own(reference)) if ":" in reference else None


def _class_option(factory: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(factory).parameters
    for name in CLASS_OPTIONS:
        given = parameters.get(name)  # a whole number, and no list of names
        if given and (name == CLASS_OPTIONS[0] or given.annotation in (int, "int")):
            return name
        if given and type(given.default) is int:
            return name
    return CLASS_OPTIONS[0] if _takes(factory, CLASS_OPTIONS[0]) else None


def count_of(reference: str, classes: int) -> int:
    """Return the ``num_classes`` of a network for data of ``classes`` classes.

    It is one more for detectors of torchvision whose first class stands for no object.
    """
    scheme, _, name = reference.partition(":")
    return classes + int(scheme == "torchvision" and name.startswith(_WITH_BACKGROUND))


def takes_unit_range(reference: str) -> bool:
    """Return whether a network takes images in [0, 1]: as they are, or it normalizes by itself."""
    return reference.startswith("ultralytics:") or is_torchvision_detector(reference)


def is_torchvision_detector(reference: str) -> bool:
    """Return whether ``reference`` names one of torchvision's networks that find boxes."""
    scheme, _, name = reference.partition(":")
    return scheme == "torchvision" and name.startswith(_DETECTORS)


def check_reference(reference: str) -> None:
    """Check that ``reference`` names a constructor, without calling it.

    Raises:
        UsageError: it is of no known form.
        ModelError: its file or module cannot be imported, or it is a detector of torchvision that
            is not read.
    """
    scheme, _, name = reference.partition(":")
    if scheme == "torchvision":
        _known_torchvision(name)
    elif scheme == "timm":
        _known_timm(name)
    elif scheme == "ultralytics":
        require("ultralytics", extra="ultralytics", purpose=f"network {reference!r}")
    else:
        _own(reference)


def construct(
    reference: str,
    num_classes: int | None,
    options: Mapping[str, Any],
    *,
    published: str | None = None,
) -> nn.Module:
    """Return what the constructor of ``reference`` returns, with its own or published weights."""
    scheme, _, name = reference.partition(":")
    given = ({} if num_classes is None else {"num_classes": num_classes}) | dict(options)
    if scheme == "torchvision":
        return _torchvision(name, given, published)
    if scheme == "timm":
        return _timm(name, given, published)
    if scheme == "ultralytics":
        return _call(reference, _ultralytics, {"name": name, **given})
    if published is not None:
        raise ModelError(f"no such weight file {published!r}", where=reference)
    factory = _own(reference)
    if num_classes is not None:
        name = _class_option(factory) or CLASS_OPTIONS[0]
        given = {name: num_classes} | dict(options)
    return _call(reference, factory, given)


def described(reference: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a reference and options that build the same network without running pickled code."""
    told = dict(options)
    if not (reference.startswith("ultralytics:") and reference.endswith(".pt")):
        return reference, told
    network: Any = construct(reference, None, told)
    told.pop("trust", None)
    return f"ultralytics:{Path(str(network.yaml['yaml_file'])).name}", told


def _torchvision(name: str, given: dict[str, Any], published: str | None) -> nn.Module:
    from torchvision import models

    _known_torchvision(name)
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        given = {"weights_backbone": None, **given}  # else torchvision downloads them

    def built(**more: Any) -> nn.Module:
        return _call(f"torchvision:{name}", models.get_model, {"name": name, **more, **given})

    if published is None:
        return built()
    try:
        chosen = models.get_model_weights(name)[published]
    except KeyError:
        names = [weights.name for weights in models.get_model_weights(name)]
        raise UnknownNameError("weight file or published weights", published, names) from None
    classes = given.pop("num_classes", None)
    model = built(weights=chosen)
    if classes is None or not is_torchvision_detector(f"torchvision:{name}"):
        return model if classes is None else replace_head(model, classes)
    made = built(num_classes=classes)
    state = model.state_dict()
    made.load_state_dict(state | of_other_classes(made.state_dict(), state))
    return made


def _timm(name: str, given: dict[str, Any], published: str | None) -> nn.Module:
    timm = _known_timm(name)
    tag = f"{name}.{published}" if published not in {None, "pretrained"} else name
    return _call(
        f"timm:{name}",
        timm.create_model,
        {"model_name": tag, "pretrained": published is not None, **given},
    )


def _ultralytics(name: str, num_classes: int | None = None, trust: bool = False) -> nn.Module:
    """Return one of Ultralytics' networks: of a YAML or, where trusted, of their ``.pt``."""
    purpose = f"network 'ultralytics:{name}'"
    require("ultralytics", extra="ultralytics", purpose=purpose)
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    settings: Any = importlib.import_module("ultralytics.cfg")
    if name.endswith(".pt"):
        if not trust or is_limited():
            raise ModelError(
                "a .pt of Ultralytics holds pickled code, which opening it would run",
                where=f"ultralytics:{name}",
                fix="If you trust where it is from: --trust (from Python, options={'trust': True})",
            )
        model: Any = tasks.load_checkpoint(name)[0]
        if num_classes not in (None, model.yaml["nc"]):
            raise ModelError(f"has {model.yaml['nc']} classes, not {num_classes}", where=name)
    else:
        described = tasks.yaml_model_load(name)
        kind = _ULTRALYTICS[tasks.guess_model_task(described)]
        with _quiet("ultralytics"):
            model = getattr(tasks, kind)(described, nc=num_classes, verbose=False)
    model.args = settings.get_cfg()  # what their own losses are weighed by
    found: nn.Module = model.float()
    return found


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep what a package logs for information off the terminal."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _known_torchvision(name: str) -> None:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise UnknownNameError("torchvision network", name, nearest(name, known, 8) or known)
    returned = inspect.signature(models.get_model_builder(name)).return_annotation
    check_detector(returned, f"torchvision:{name}")


def _known_timm(name: str) -> ModuleType:
    timm = require("timm", extra="timm", purpose=f"network 'timm:{name}'")
    if not timm.is_model(name):
        raise UnknownNameError("timm network", name, nearest(name, timm.list_models(), 8))
    return timm


def _own(reference: str) -> Callable[..., nn.Module]:
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise _no_reference(reference)
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UnknownNameError("network", name, known, where=source)
    found: Callable[..., nn.Module] = factory
    return found


def _no_reference(reference: str) -> UsageError:
    """Return what is wrong with a text that has no colon and names no saved network."""
    path = Path(reference)
    if os.path.isdir(path):  # a text of any length
        return UsageError(
            "is a folder in which no network is saved",
            where=reference,
            expected="a run or stage folder, or what compress.save_model wrote",
        )
    if os.path.isfile(path) and path.suffix == ".py":
        return UsageError(
            "is a file of code", where=reference, fix=f"Name the network in it: {reference}:NAME"
        )
    if os.path.isfile(path) and path.suffix in ENDINGS:
        return UsageError(
            "holds weights, which need the code of their network",
            where=reference,
            fix=f"Name the network, and the file beside it: FILE.py:NAME --weights {reference} "
            "(in a recipe model.weights)",
        )
    close = absence(path, "file or folder").partition(".")[2]
    return UsageError(
        f"{reference!r} is no reference to a network" + (f".{close}" if close else ""),
        expected="torchvision:NAME, timm:NAME, ultralytics:FILE.yaml, package.module:factory, "
        "path/file.py:factory, a run or stage folder, or FILE.onnx",
    )


def _import_file(path: Path) -> ModuleType:
    try:
        return import_file(path, "the Python file that defines the network")
    except UsageError as error:
        raise ModelError(
            error.what, where=error.where, expected=error.expected, fix=error.fix
        ) from error.__cause__


def _import_module(name: str) -> Any:
    check_code(name)
    try:
        return importlib.import_module(FORMER_NAMES.get(name, name))
    except ImportError as error:
        raise ModelError(f"cannot be imported: {error}", where=name) from None


def _call(reference: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> nn.Module:
    unknown = [key for key in given if not _takes(factory, key)]
    if unknown:
        parameters = inspect.signature(factory).parameters
        raise ModelError(
            f"its constructor takes no {', '.join(unknown)}",
            where=reference,
            expected=f"one of: {', '.join(parameters) or 'nothing'}",
        )
    try:
        model = factory(**given)
    except CompressError:
        raise
    except Exception as error:
        raise ModelError(f"cannot be built: {error!r}", where=reference) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"returned a {type(model).__name__}", where=reference, expected="a torch.nn.Module"
        )
    return model


def _takes(factory: Callable[..., Any], option: str) -> bool:
    parameters = inspect.signature(factory).parameters
    if option in parameters:
        return True
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def classifier_layers(model: nn.Module) -> list[str]:
    """Return the names of the classifier and of the auxiliary ones with as many outputs.

    Raises:
        ModelError: the network has no layer that could be a classifier.
    """
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1)
    ]
    main = [(name, layer) for name, layer in layers if "aux" not in name.lower()]
    if not main:
        raise ModelError(
            "no linear layer or 1x1 convolution that could be the classifier",
            where=type(model).__name__,
            fix="Build the network with the right number of classes yourself",
        )
    last, head = main[-1]
    auxiliary = [
        name
        for name, layer in layers
        if "aux" in name.lower() and _outputs(layer) == _outputs(head)
    ]
    return [last, *auxiliary]


def replace_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Return a copy of a network whose last layer has ``num_classes`` outputs.

    With the last linear layer or 1x1 convolution the auxiliary heads (names with "aux") of as many
    classes are replaced; new layers start from their default initialization. Weights that fit
    already are kept.

    Raises:
        ModelError: the network has no layer that could be a classifier.
    """
    model = copy.deepcopy(model)
    names = classifier_layers(model)
    classes = _outputs(model.get_submodule(names[0]))
    if classes == num_classes:
        return model
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, _with_outputs(layer, num_classes))
    if getattr(model, "num_classes", None) == classes:
        model.num_classes = num_classes  # type: ignore[assignment]  # a plain int of the user's
    return model


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def _with_outputs(layer: nn.Module, outputs: int) -> nn.Module:
    weight = layer.weight
    like = {"device": weight.device, "dtype": weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, outputs, bias=bias, **like)
    else:
        new = nn.Conv2d(layer.in_channels, outputs, 1, bias=bias, **like)  # type: ignore[arg-type]
    return new.train(layer.training)
