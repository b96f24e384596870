"""What each op does to the labels of its inputs; an op without a rule freezes what it touches."""

from __future__ import annotations

from compress.groups.calls import tensors_in
from compress.groups.record import Call
from compress.groups.rules import layout, linear, moving, norms, spatial
from compress.groups.tracer import Rule, Tracer


def unknown(tracer: Tracer, call: Call) -> None:
    """Nothing is known about this op: every channel it sees must stay."""
    for tensor in tensors_in((*call.args, *call.kwargs.values())):
        tracer.freeze_each(tracer.axes(tensor), f"no rule for the operation {call.name}")


RULES: dict[str, Rule] = {"unknown": unknown} | {
    name: rule
    for module in (linear, norms, spatial, layout, moving)
    for name, rule in module.RULES.items()
}
