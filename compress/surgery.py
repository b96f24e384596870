"""Cut a network by a plan: plan data, the cut itself, its masked twin, and the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from compress.groups import Network, Positions
from compress.groups.trace import Example


@dataclass(frozen=True)
class PrunePlan:
    """What to cut, exactly: JSON-able, the same for the same network and seed."""

    groups: Mapping[str, Positions]  # group -> indices of the units that are kept, ascending
    group_sizes: Mapping[str, int]
    tensors: Mapping[str, Mapping[int, Positions]]  # tensor -> dim -> positions kept
    shapes: Mapping[str, tuple[int, ...]]  # of those tensors before the cut
    attributes: Mapping[str, Mapping[str, Any]]  # module -> attribute -> new value
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    frozen: Mapping[str, str]  # layer -> why it was not cut
    about: Mapping[str, Any] = field(default_factory=dict)  # criterion, settings, seed

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able data."""
        raise RuntimeError("being written")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrunePlan:
        """Return the plan that ``to_json`` wrote; PlanError if it is damaged."""
        raise RuntimeError("being written")

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, in one step."""

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan that ``save`` wrote."""
        raise RuntimeError("being written")

    def then(self, later: PrunePlan) -> PrunePlan:
        """Return the one plan that does what this plan and then ``later`` do."""
        raise RuntimeError("being written")


def make_plan(network: Network, keep: Mapping[str, Positions], **about: Any) -> PrunePlan:
    """Turn kept units into a plan; groups that ``keep`` leaves out stay whole.

    Args:
        network: What ``trace`` returned.
        keep: Group name -> indices of kept units (any order), at least one each.
        about: What the plan should remember: criterion, settings, seed. JSON-able.

    Raises:
        PlanError: an unknown group, indices out of range or repeated, nothing kept.
    """
    raise RuntimeError("being written")


def apply_pruning(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return a pruned copy of ``model``."""
    raise RuntimeError("being written")


def mask_pruning(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return the masked twin: original shapes, zero wherever the plan cuts."""
    raise RuntimeError("being written")


def prove(model: nn.Module, plan: PrunePlan, example_input: Example) -> float:
    """Return the largest relative difference of pruned network and masked twin on an input."""
    raise RuntimeError("being written")
