"""Which layers of a graph must stay in float, found by halving."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MOST_ALONE = 3  # layers found one by one; after them all that follow the next are taken


def needed_in_float(
    layers: Sequence[str], is_right: Callable[[Sequence[str]], bool]
) -> list[str] | None:
    """Return few of ``layers`` that, left in float, make a graph right; None if all do not.

    The last layer is looked for from which on all must be in float; it alone is taken, and the
    search goes on with those after it. Each costs as many questions as ``len(layers)`` has bits.

    Args:
        layers: Names, in the order in which the graph computes them.
        is_right: Whether a graph with the layers given in float is right.
    """
    if not is_right(layers):
        return None
    taken: list[str] = []
    start = 0
    while True:
        right, wrong = start, len(layers)  # in float from there on: is right, is wrong
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if is_right([*taken, *layers[middle:]]):
                right = middle
            else:
                wrong = middle
        if right == len(layers) - 1 or len(taken) == MOST_ALONE:
            return [*taken, *layers[right:]]
        taken.append(layers[right])
        start = right + 1
        if is_right(taken):
            return taken


def most_asked(layers: Sequence[str]) -> int:
    """Return how often ``needed_in_float`` asks at most."""
    return 1 + (MOST_ALONE + 1) * (len(layers).bit_length() + 1)
