"""Run a network once on the meta device and follow every channel through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compress.groups.network import Network

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def trace(model: nn.Module, example_input: Example) -> Network:
    """Return the groups of channels of ``model`` that can be cut, and what each layer costs.

    Args:
        model: Any network; its parameters, mode and hooks are left as they are.
        example_input: One input, a tuple of positional inputs, or a dict of keyword inputs. Only
            shapes and types matter.

    Raises:
        PlanError: the network cannot be run on the example, or nothing in it can be cut.
    """
    raise RuntimeError("being written")
