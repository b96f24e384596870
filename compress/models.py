"""References to networks: build them, load weights without pickled code, save and reload them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import artifact
from compress.errors import ModelError, PlanError, UnknownNameError, UsageError, nearest
from compress.packages import require
from compress.surgery import PrunePlan, apply_pruning
from compress.weights import fit, is_weight_file, read_safetensors, read_weights, write_safetensors

SCHEMA = 1
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
PLAN_FILE = "plan.json"


def is_onnx(reference: str | Path) -> bool:
    """Return whether ``reference`` names an ONNX file."""
    return str(reference).endswith(".onnx")


def load_model(
    reference: str | Path,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the network that ``reference`` names, in eval mode on the CPU.

    Args:
        reference: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``,
            ``path/file.py:factory``, or a folder that a run or ``save_model`` wrote.
        weights: A weight file, or the name of weights that torchvision or timm publish (these are
            downloaded, as they were asked for by name). Random weights if absent.
        num_classes: Outputs of the classifier; the constructor's default if absent.
        options: Further keyword arguments of the constructor.

    Raises:
        UsageError: the reference is of no known form.
        ModelError: the network cannot be built, or the weights do not fit.
    """
    text = str(reference)
    folder = model_folder(Path(text))
    if folder is not None:
        model = _load_saved(folder)
    elif is_onnx(text):
        raise ModelError(
            "an ONNX file is not a network that can be trained or pruned",
            where=text,
            fix="Use it with quantize, build, bench, compare or lint",
        )
    else:
        published = weights is not None and not is_weight_file(weights)
        model = build(
            text, num_classes, options or {}, published=str(weights) if published else None
        )
        if published:
            weights = None
    if weights is not None:
        fit(model, read_weights(Path(weights)), where=str(weights))
    return model.eval()


def build(
    reference: str,
    num_classes: int | None,
    options: Mapping[str, Any],
    *,
    published: str | None = None,
) -> nn.Module:
    """Return what the constructor of ``reference`` returns, with its own or published weights."""
    scheme, _, name = reference.partition(":")
    given = dict(options) | ({} if num_classes is None else {"num_classes": num_classes})
    if scheme == "torchvision":
        return _torchvision(name, given, published)
    if scheme == "timm":
        return _timm(name, given, published)
    if published is not None:
        raise ModelError(f"no such weight file {published!r}", where=reference)
    source, _, factory = reference.rpartition(":")
    if not source or not factory:
        raise UsageError(
            f"{reference!r} is no reference to a network",
            expected="torchvision:NAME, timm:NAME, package.module:factory, path/file.py:factory, "
            "a run or stage folder, or FILE.onnx",
        )
    return _call(reference, _factory(source, factory), given)


def check_forward(model: nn.Module, example: Tensor) -> tuple[int, ...]:
    """Return the shape of the output for ``example`` (B, C, H, W); the model is left as found.

    Raises:
        ModelError: the forward pass fails; the message says with what.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(example)
    except Exception as error:
        shape = tuple(example.shape)
        raise ModelError(
            f"its forward pass fails on an input of shape {shape}: {error}",
            where=type(model).__name__,
            fix="Check the image size and channels of the data against what the network expects",
        ) from error
    finally:
        model.train(was_training)
    first = output if isinstance(output, Tensor) else next(iter(_leaves(output)))
    return tuple(first.shape)


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
        model: The network; pruned by ``plan`` if there is one.
        folder: Where ``model.json``, ``model.safetensors`` and ``plan.json`` are written.
        reference: What the network was built from. If this is a folder of an earlier
            ``save_model``, its plan and the new one are joined.
        plan: The pruning plan that made ``model`` out of ``reference``.
        num_classes: As given to the constructor; found out from the weights if absent.
        options: As given to the constructor.

    Raises:
        ModelError: ``reference`` and ``plan`` do not give a network of these shapes.
    """
    folder = Path(folder)
    description, earlier = _description(reference, num_classes, options or {})
    if earlier is not None:
        plan = earlier.then(plan) if plan is not None else earlier
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if description["num_classes"] is None:
        description["num_classes"] = _infer_classes(state, description, plan)
    if plan is not None:
        plan.save(folder / PLAN_FILE)
    write_safetensors(folder / WEIGHTS_FILE, state)
    artifact.write_json(folder / DESCRIPTION_FILE, description | {"pruned": plan is not None})
    return folder


def model_folder(path: Path) -> Path | None:
    """Return ``path`` if a network is saved in it, or the last stage of a run that has one."""
    if (path / DESCRIPTION_FILE).is_file():
        return path
    stages = sorted(path.glob(f"[0-9][0-9]-*/{DESCRIPTION_FILE}")) if path.is_dir() else []
    return stages[-1].parent if stages else None


def _load_saved(folder: Path) -> nn.Module:
    description, plan = _read_description(folder)
    model = _rebuild(description, plan, description["num_classes"])
    path = folder / WEIGHTS_FILE
    fit(model, read_safetensors(path), where=str(path))
    return model


def _rebuild(
    description: Mapping[str, Any], plan: PrunePlan | None, num_classes: int | None
) -> nn.Module:
    model = build(description["reference"], num_classes, description["options"])
    return model if plan is None else apply_pruning(model, plan)


def _description(
    reference: str | Path, num_classes: int | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], PrunePlan | None]:
    folder = model_folder(Path(reference))
    if folder is not None:
        return _read_description(folder)
    fresh = {
        "schema": SCHEMA,
        "reference": str(reference),
        "num_classes": num_classes,
        "options": dict(options),
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
    return description, PrunePlan.load(folder / PLAN_FILE) if description["pruned"] else None


def _infer_classes(
    state: Mapping[str, Tensor], description: Mapping[str, Any], plan: PrunePlan | None
) -> int | None:
    """Return the ``num_classes`` that rebuilds these shapes; None where the default does."""
    cut = plan.tensors if plan is not None else {}
    default = build(description["reference"], None, description["options"]).state_dict()
    counts = {
        value.shape[0]
        for key, value in state.items()
        if key in default and value.ndim and 0 not in cut.get(key, {})
        if value.shape[0] != default[key].shape[0]
    }
    shapes = {key: value.shape for key, value in state.items()}
    for classes in [None, *sorted(counts)]:
        try:
            rebuilt = _rebuild(description, plan, classes).state_dict()
        except PlanError:  # made for another number of classes
            continue
        if {key: value.shape for key, value in rebuilt.items()} == shapes:
            return classes
    raise ModelError(
        "the reference and the plan do not give a network of these shapes",
        where=description["reference"],
        fix="Give the num_classes and options that the network was built with",
    )


def _torchvision(name: str, given: dict[str, Any], published: str | None) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise UnknownNameError("torchvision network", name, nearest(name, known, 8) or known)
    if published is None:
        return _call(f"torchvision:{name}", models.get_model, {"name": name, **given})
    try:
        chosen = models.get_model_weights(name)[published]
    except KeyError:
        names = [weights.name for weights in models.get_model_weights(name)]
        raise UnknownNameError("weight file or published weights", published, names) from None
    classes = given.pop("num_classes", None)
    model = _call(
        f"torchvision:{name}", models.get_model, {"name": name, "weights": chosen, **given}
    )
    return _with_classes(model, classes, len(chosen.meta["categories"]))


def _timm(name: str, given: dict[str, Any], published: str | None) -> nn.Module:
    timm = require("timm", extra="timm", purpose=f"network 'timm:{name}'")
    if not timm.is_model(name):
        raise UnknownNameError("timm network", name, nearest(name, timm.list_models(), 8))
    tag = f"{name}.{published}" if published not in {None, "pretrained"} else name
    return _call(
        f"timm:{name}",
        timm.create_model,
        {"model_name": tag, "pretrained": published is not None, **given},
    )


def _with_classes(model: nn.Module, wanted: int | None, classes: int) -> nn.Module:
    if wanted is None or wanted == classes:
        return model
    return replace_head(model, wanted)


def replace_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last linear or 1x1 convolution of ``model`` by a new one; returns ``model``.

    Raises:
        ModelError: the network ends in neither.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    name, last = layers[-1] if layers else ("", None)
    new: nn.Module
    if isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    elif isinstance(last, nn.Conv2d) and last.kernel_size == (1, 1):
        new = nn.Conv2d(last.in_channels, num_classes, 1, bias=last.bias is not None)
    else:
        raise ModelError(
            "its last layer is no linear layer or 1x1 convolution, so its head cannot be replaced",
            where=type(model).__name__,
        )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
    return model


def _factory(source: str, name: str) -> Callable[..., nn.Module]:
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UnknownNameError("network", name, known, where=source)
    found: Callable[..., nn.Module] = factory
    return found


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError("no such file", where=str(path))
    name = f"compress_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError("cannot be imported", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling of classes look it up
    sys.path.insert(0, str(path.resolve().parent))  # for the imports of neighbouring files
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"importing it fails: {error!r}", where=str(path)) from error
    finally:
        sys.path.pop(0)
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"cannot be imported: {error}", where=name) from None


def _call(reference: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> nn.Module:
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in given if key not in parameters and not takes_any]
    if unknown:
        raise ModelError(
            f"its constructor takes no {', '.join(unknown)}",
            where=reference,
            expected=f"one of: {', '.join(parameters) or 'nothing'}",
        )
    try:
        model = factory(**given)
    except Exception as error:
        raise ModelError(f"cannot be built: {error!r}", where=reference) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"returned a {type(model).__name__}", where=reference, expected="a torch.nn.Module"
        )
    return model


def _leaves(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]
