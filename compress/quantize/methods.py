"""The methods that a user may choose from, and the one that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compress.errors import QuantizationError, UnknownNameError
from compress.qdq.plan import QuantPlan
from compress.quantize.nncf import plan_by_nncf
from compress.quantize.notes import decided
from compress.quantize.ranges import begin_below_zero
from compress.quantize.search import auto
from compress.quantize.workbench import Workbench

Method = Callable[[Workbench], QuantPlan]


def plain(bench: Workbench) -> QuantPlan:
    """Ranges only."""
    return bench.ranges()


def bias_correction(bench: Workbench) -> QuantPlan:
    """Ranges, weight scales by search, biases corrected layer by layer."""
    return bench.corrected(bench.scaled(bench.ranges()))


def equalization(bench: Workbench, alpha: float = 0.5) -> QuantPlan:
    """Channels equalized, then as in bias-correction."""
    return bench.corrected(bench.scaled(bench.equalized(bench.ranges(), alpha)))


def rounding(bench: Workbench) -> QuantPlan:
    """Weights rounded with feedback and biases corrected, layer by layer."""
    return bench.rounded(bench.ranges())


def nncf(bench: Workbench) -> QuantPlan:
    """Ranges and biases of NNCF, written by our writer."""
    plan = plan_by_nncf(bench.prepared, bench.fitted, bench.ranges())
    return begin_below_zero(plan, bench.prepared)


METHODS: Mapping[str, Method] = {
    "auto": auto,
    "plain": plain,
    "bias-correction": bias_correction,
    "equalization": equalization,
    "rounding": rounding,
    "nncf": nncf,
}
EQUALIZING = frozenset({"auto", "equalization"})  # they must know channels


def check_method(method: str) -> None:
    """Raise UnknownNameError unless there is such a method."""
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)


def plan_by(method: str, bench: Workbench) -> QuantPlan:
    """Return the plan that ``method`` makes.

    Raises:
        UnknownNameError: there is no such method.
        QuantizationError: it needs a free batch size, and the graph's cannot be freed.
    """
    check_method(method)
    if not bench.is_free and method == "auto":
        note = "ranges only: the batch size is fixed in the graph, and corrections need a free one"
        made = plain(bench)
        return made.changed(method=method, notes=(note, *bench.notes(made)))
    if not bench.is_free and method != "plain":
        raise QuantizationError(
            f"method {method!r} needs a free batch size, and this graph fixes it",
            fix="Export the network with a dynamic batch, or use method 'plain'",
        )
    made = METHODS[method](bench)
    notes = (*decided(made.notes), *bench.notes(made))
    return made.changed(method=method, notes=notes, trials=made.notes)
