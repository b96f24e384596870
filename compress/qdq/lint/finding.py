"""A finding of a rule about one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that costs accuracy or speed on the target.

    Args:
        rule: Name of the rule, as in ``compress.qdq.lint.RULES``.
        node: Name of the node it is about.
        message: What is wrong, what it costs, and what to do.
        fixable: Whether ``fix_onnx`` fixes it.
    """

    rule: str
    node: str
    message: str
    fixable: bool

    def to_json(self) -> dict[str, Any]:
        """Return this finding as JSON-able data."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """A finding as its rule reports it, with the edit of the graph that fixes it, if any."""

    node: str
    message: str
    edit: Callable[[], None] | None = None
