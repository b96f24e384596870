"""Pruning in several rounds: how much of the original each round keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def keep_in_round(keep: float, number: int, rounds: int) -> float:
    """Return the share of the *original* that is kept after round ``number`` of ``rounds``.

    Every round keeps the same share of what it finds, so early rounds cut the most channels and
    late ones the fewest: keep ** (number / rounds). To plan a round on the network that the round
    before has left, divide by the share that is actually left of it.

    Args:
        keep: Share of the original kept in the end, in (0, 1].
        number: 1, 2, ..., rounds.
        rounds: Rounds in all.

    Returns:
        The share, in [keep, 1); exactly ``keep`` for the last round.
    """
    if not 1 <= number <= rounds:
        raise ValueError(f"round {number} of {rounds}")
    return keep if number == rounds else keep ** (number / rounds)


def rounds_of(about: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what is known of every round of a plan, the last first."""
    yield about
    if "after" in about:
        yield from rounds_of(about["after"])


def latency_left(rounds: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of the original's latency that was measured when ``rounds`` were planned."""
    facts = (each["latency"] for each in rounds)
    shares: Iterator[float] = (fact["planned_ms"] / fact["original_ms"] for fact in facts)
    return math.prod(shares)
