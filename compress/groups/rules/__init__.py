"""What each op does to the labels of its inputs; an op without a rule freezes what it touches."""

from __future__ import annotations

from compress.groups.meta_ops import tensors_in
from compress.groups.record import Call
from compress.groups.rules import layout, linear, moving, norms, pointwise, spatial, whole
from compress.groups.tracer import Rule, Tracer

RULES: dict[str, Rule] = {
    name: rule
    for module in (pointwise, linear, norms, spatial, layout, moving, whole)
    for name, rule in module.RULES.items()
}


def freeze_all(tracer: Tracer, call: Call) -> None:
    """The fallback: nothing is known about this op, so every channel it sees must stay."""
    for tensor in (*tensors_in(call.args), *tensors_in(tuple(call.kwargs.values()))):
        for axis in tracer.axes(tensor):
            tracer.freeze(axis, f"no rule for the operation {call.name}")
