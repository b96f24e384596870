"""Scores of all units of a network by one criterion."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from compress import plugins
from compress.errors import PlanError, UsageError
from compress.groups import Group, Network
from compress.prune.cost import Floats
from compress.prune.criteria import ChannelGroup, Criterion, Evidence, Need
from compress.prune.loss import AS_SEEN, Loss, Reading
from compress.prune.saliency import LABELLED, Batches, Sampling, evidence

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def build_criterion(reference: str | Mapping[str, Any] | Criterion, seed: int) -> Criterion:
    """Return the criterion that ``reference`` names, or ``reference`` if it is one.

    Raises:
        UnknownNameError: there is no such criterion.
        UsageError: it has no such option.
    """
    if isinstance(reference, str | Mapping):
        criterion: Criterion = plugins.create("criteria", reference, seed=seed)
        return criterion
    return reference


def scores(
    model: nn.Module,
    network: Network,
    criterion: Criterion,
    batches: Batches | None,
    seed: int,
    loss: Loss | None = None,
    reading: Reading = AS_SEEN,
) -> list[Floats]:
    """Return the importance of the units of every group, (C,) each, higher = keep.

    Raises:
        UsageError: the criterion needs images and ``batches`` is None or empty, or takes no loss.
        PlanError: it gives something else than one finite number for each unit, or the same to all.
    """
    needs = getattr(criterion, "needs", ())
    wanted = cast("tuple[Need, ...]", (needs,) if isinstance(needs, str) else needs)
    if loss is not None and not {*LABELLED} & {*wanted}:
        raise UsageError(
            f"criterion {criterion_name(criterion)!r} takes no gradients of a loss, but loss= is "
            "given",
            fix="Leave loss out, or use taylor or hessian",
        )
    if wanted and batches is None:
        raise UsageError(
            f"criterion {criterion_name(criterion)!r} needs {' and '.join(wanted)} on images, "
            "and no images are given",
            expected="batches of images (B, C, H, W) and labels (B,)",
            fix="Pass batches=, or use a criterion that needs none, such as l2",
        )
    given = ("images_per_gradient", "temperature")
    options = {name: getattr(criterion, name) for name in given if hasattr(criterion, name)}
    sampling = Sampling(seed=seed, **options)
    shown = list(batches or ()) if len(wanted) > 1 else batches or ()
    found = (
        evidence(model, network, need, shown, sampling, loss=loss, reading=reading)
        for need in wanted
    )
    seen = functools.reduce(Evidence.joined, found, Evidence())
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    scales = frozenset(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, NORMS)
    )
    norms: dict[tuple[str, int, int], Tensor] = {}
    with torch.no_grad():
        rows = [
            _checked(criterion(ChannelGroup(group, tensors, scales, seen, norms)), group)
            for group in network.groups
        ]
    _check_choice(rows, criterion, wanted)
    return rows


def _check_choice(rows: list[Floats], criterion: Criterion, needs: tuple[Need, ...]) -> None:
    """Raise PlanError where all scores are equal: then nothing says which channels to keep."""
    values = np.concatenate(rows) if rows else np.zeros(0)
    if len(values) < 2 or (values != values[0]).any():
        return
    fix = (
        "Give trained weights: outputs of an untrained network may not depend on its images; or "
        "use the criterion l1; from Python, give batches and a loss= whose gradient reaches it"
        if needs
        else "Give trained weights, or use the criterion random"
    )
    raise PlanError(
        f"the criterion {criterion_name(criterion)!r} gives every channel the same score, "
        f"{values[0]:g}: it does not say which to keep",
        fix=fix,
    )


def criterion_name(criterion: Criterion) -> str:
    """Return the name of a criterion as users write it."""
    module = type(criterion).__module__
    is_plugin = module.startswith("compress.prune.criteria.")
    return module.rpartition(".")[2] if is_plugin else type(criterion).__name__


def criterion_options(criterion: Criterion) -> dict[str, Any]:
    """Return the options of a criterion, by name."""
    names = getattr(type(criterion), "__dataclass_fields__", {})
    return {name: getattr(criterion, name) for name in names}


def _checked(found: Tensor, group: Group) -> Floats:
    if tuple(found.shape) != (group.size,):
        raise PlanError(
            f"the criterion gives scores of shape {tuple(found.shape)}",
            where=group.name,
            expected=f"one for each of its {group.size} channels",
        )
    values = found.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise PlanError(
            "the criterion gives scores that are not finite",
            where=group.name,
            fix="Check the weights for NaN or infinity",
        )
    return values
