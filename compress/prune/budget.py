"""How far to prune: one budget out of several kinds, and its shares of several rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from compress.errors import PlanError, UsageError, nearest
from compress.groups import Network
from compress.groups.plan import PrunePlan

Kind = Literal["macs", "params", "channels", "latency", "latency_ms"]
NAMES: dict[Kind, str] = {
    "macs": "keep_macs",
    "params": "keep_params",
    "channels": "keep_channels",
    "latency": "keep_latency",
    "latency_ms": "latency_ms",
}
BUDGETS = tuple(NAMES.values())


@dataclass(frozen=True)
class Budget:
    """One limit: a share of MACs, parameters, channels (by layer perhaps) or time, or a time."""

    kind: Kind
    value: float | Mapping[str, float]

    @property
    def share(self) -> float:
        """The limit of a budget that is one number."""
        if isinstance(self.value, Mapping):
            raise TypeError("keep_channels has one share for each layer")
        return self.value

    def in_round(self, number: int, rounds: int, done: PrunePlan | None) -> Budget:
        """Return the budget of one of several rounds, of the network that those before it left.

        Args:
            number: 1, 2, ..., rounds.
            rounds: Rounds in all.
            done: The joined plan of the rounds before; None in the first.
        """
        if self.kind == "latency_ms" or isinstance(self.value, Mapping):
            return self
        if self.kind == "channels":
            return Budget(self.kind, self.value ** (1 / rounds))
        if done is None:
            left = 1.0
        elif self.kind == "latency":
            left = latency_left(rounds_of(done.about))
        else:
            before, after = (getattr(done, f"{self.kind}_{when}") for when in ("before", "after"))
            left = after / before
        return Budget(self.kind, min(1.0, keep_in_round(self.value, number, rounds) / left))

    def to_json(self) -> dict[str, Any]:
        """Return this budget under the name that the user gave it."""
        value = dict(self.value) if isinstance(self.value, Mapping) else self.value
        return {NAMES[self.kind]: value}


def one_budget(**budgets: float | Mapping[str, float] | None) -> Budget:
    """Return the one budget that is given, by its name among ``BUDGETS``.

    Raises:
        UsageError: none or several are given, or it is out of range.
    """
    given = {k: value for k, name in NAMES.items() if (value := budgets.get(name)) is not None}
    if len(given) != 1:
        named = " and ".join(NAMES[kind] for kind in given)
        raise UsageError(
            f"{named} contradict each other" if given else "no budget says how far to prune",
            expected=f"exactly one of {', '.join(BUDGETS)}",
            fix="Leave one of them" if given else "Give for instance keep_macs=0.5",
        )
    ((kind, value),) = given.items()
    if isinstance(value, Mapping):
        if not value:
            raise UsageError("keep_channels names no layer", fix="Give {layer: share, ...}")
        for layer, share in value.items():
            _check(f"keep_channels[{layer!r}]", share, "channels")
    else:
        _check(NAMES[kind], value, kind)
    return Budget(kind, value)


def _check(name: str, value: object, kind: Kind) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "latency_ms":
        if not is_number or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
            raise UsageError(f"{name} is {value!r}", expected="milliseconds above 0")
    elif not is_number or not 0 < float(value) <= 1:  # type: ignore[arg-type]
        raise UsageError(
            f"{name} is {value!r}",
            expected="the share that is kept, above 0 and at most 1",
            fix="To keep half, write 0.5",
        )


def groups_of(model: nn.Module, network: Network, layer: str, option: str) -> list[int]:
    """Return the groups whose channels ``layer``, or a layer inside it, produces.

    Args:
        model: The network, to tell a name that exists from one that does not.
        network: What ``trace`` returned for it.
        layer: A module's name, or a group's.
        option: What the user wrote it under, for the error.

    Raises:
        UsageError: there is no such layer; the message names the nearest.
    """
    found = [
        number
        for number, group in enumerate(network.groups)
        if group.name == layer
        or any(
            piece.role == "output" and f"{piece.tensor}.".startswith(f"{layer}.")
            for piece in group.slices
        )
    ]
    known = [name for name, _ in model.named_modules() if name]
    if not found and layer not in known:
        close = nearest(layer, known)
        raise UsageError(
            f"there is no layer {layer!r}",
            where=option,
            fix=f"Nearest names: {', '.join(close)}"
            if close
            else f"Layers: {', '.join(known[:8])}",
        )
    return found


def shares_by_group(
    model: nn.Module, network: Network, shares: Mapping[str, float]
) -> dict[int, float]:
    """Return the share of channels that each named group keeps.

    Raises:
        UsageError: there is no such layer.
        PlanError: the layer's channels cannot be cut, or two layers of one group contradict.
    """
    found: dict[int, float] = {}
    said_by: dict[int, str] = {}
    for layer, share in shares.items():
        numbers = groups_of(model, network, layer, "keep_channels")
        if not numbers and share < 1:
            reason = network.frozen.get(layer, "it produces no channels that could be cut")
            raise PlanError(f"the channels of this layer stay: {reason}", where=layer)
        for number in numbers:
            if found.setdefault(number, share) != share:
                raise PlanError(
                    f"keeps {share:g} of its channels but {said_by[number]}, which is cut together "
                    f"with it, keeps {found[number]:g}",
                    where=f"keep_channels: {layer}",
                    fix="Give both the same share, or name one of them",
                )
            said_by.setdefault(number, layer)
    return found


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
