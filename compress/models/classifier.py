"""Replace the classifier head for other classes."""

from __future__ import annotations

import copy

from torch import nn

from compress.errors import ModelError


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
