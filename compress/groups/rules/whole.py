"""Calls that are followed as a whole: what PyTorch makes of them differs by device and mode."""

from __future__ import annotations

from torch import Tensor

from compress.groups.calls import MAKERS
from compress.groups.labels import Axis
from compress.groups.meta_ops import tensors_in
from compress.groups.record import Call, Use
from compress.groups.rules.norms import label_reduced
from compress.groups.tracer import Rule, Tracer


def attention(tracer: Tracer, call: Call) -> None:
    """Softmax of queries (..., N, E) times keys (..., M, E), times values (..., M, V).

    The default scale counts the kept positions of E, and the softmax is over the kept of M.
    """
    out, given = call.outputs[0], list(tensors_in((*call.args, *call.kwargs.values())))
    plain = len(call.args) > 2 and len({tensor.ndim for tensor in call.args[:3]}) == 1
    if not plain or call.raw.argument(7, "enable_gqa", False):
        for axis in (axis for tensor in given for axis in tracer.axes(tensor)):
            tracer.freeze(axis, "attention in which several heads share one")
        return
    queries, keys, values = call.args[:3]
    *batch, rows, inner = tracer.axes(queries)
    *batch_keys, tokens, inner_keys = tracer.axes(keys)
    *batch_values, tokens_values, columns = tracer.axes(values)
    why = "attention lines it up with something fixed"
    inner = _tie(tracer, inner, inner_keys, why)
    tokens = _tie(tracer, tokens, tokens_values, why)
    for other in (batch_keys, batch_values):
        batch = [_tie(tracer, a, b, why) for a, b in zip(batch, other, strict=True)]
    mask = call.raw.argument(3, "attn_mask")
    if isinstance(mask, Tensor):
        for d, side in ((-1, tokens), (-2, rows)):
            if mask.shape[d] > 1:
                tracer.unify(side, tracer.axes(mask)[d], "an attention mask is fixed")
    tracer.label(out, (*batch, rows, columns))
    if inner is not None or tokens is not None:
        tracer.restrict(call)


def _tie(tracer: Tracer, first: Axis, second: Axis, why: str) -> Axis:
    return first if first is second else tracer.unify(first, second, why)


def recurrent(tracer: Tracer, call: Call) -> None:
    """LSTM, GRU and RNN: what the first layer reads can be cut; what a cell remembers stays."""
    x = call.args[0]
    *others, inputs = tracer.axes(x)
    weights = next(list(a) for a in call.args if isinstance(a, list) and len(a) > 1)
    for axis in others:
        tracer.freeze(axis, "a recurrent layer goes along it")
    for tensor in tensors_in(call.args[1:]):
        axes = tracer.axes(tensor)
        name = tracer.origin(tensor) or ""
        first = "weight_ih_l0" in name and tensor.ndim == 2
        for axis in axes[: 1 if first else None]:
            tracer.freeze(axis, "it is the state of a recurrent layer")
        if first:
            tracer.unify(inputs, axes[1], "a recurrent layer reads a fixed number of inputs")
        if tensor.ndim == 2 and name and any(tensor is weight for weight in weights):
            cost = tensor.numel() * (x.numel() // x.shape[-1])
            tracer.record.uses.append(Use(name, cost, axes[0], axes[1]))
    if not any("weight_ih_l0" in (tracer.origin(weight) or "") for weight in weights):
        tracer.freeze(inputs, "the weights of a recurrent layer are computed")


def quantile(tracer: Tracer, call: Call) -> None:
    """A quantile looks across a dimension as a mean does."""
    x, dim, share = call.args[0], call.raw.argument(2, "dim"), call.raw.argument(1, "q")
    dims = set(range(x.ndim)) if dim is None else {dim % x.ndim}
    label_reduced(tracer, call, dims, leading=int(isinstance(share, Tensor) and share.ndim))


def from_number(tracer: Tracer, call: Call) -> None:
    """A tensor made of one number."""


RULES: dict[str, Rule] = {
    **dict.fromkeys(MAKERS, from_number),
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("quantile", "nanquantile"), quantile),
}
