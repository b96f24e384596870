"""Conversion by torch's dynamo exporter; stack traces and local paths are removed."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ExportError, boundary
from compress.groups.calls import WatchedCalls
from compress.modules import full_copy, network_of, set_mode
from compress.modules.detectors import before_nms
from compress.modules.inputs import call_inputs, copied
from compress.modules.outputs import chosen_outputs, leaves, named_tensors, tensors_of

DEFAULT_OPSET = 20  # the first with Gelu as one op; read by ORT, OpenVINO and TensorRT 10 and 11
OPSETS = range(18, 24)  # what torch writes and the three runtimes read
SCOPES = "pkg.torch.onnx.name_scopes"
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Example:
    """Inputs of one forward pass, positional or by name, and what the ONNX file calls them."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    settings: dict[int | str, Any] = field(default_factory=dict)  # by position in a call, or name

    @classmethod
    def of(cls, given: Any) -> Example:
        """Return ``given`` as an Example on the CPU, in fp32; numbers, flags, texts are settings.

        Raises:
            ExportError: it holds something else that is no tensor with a batch dimension.
        """
        args, kwargs = call_inputs(given)
        every: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        settings = {k: v for k, v in every.items() if isinstance(v, int | float | str | None)}
        args = tuple(v for at, v in enumerate(args) if at not in settings)
        kwargs = {name: v for name, v in kwargs.items() if name not in settings}
        for tensor in (*args, *kwargs.values()):
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or not tensor.numel():
                is_tensor = isinstance(tensor, Tensor)
                kind = (
                    f"tensor of shape {tuple(tensor.shape)}" if is_tensor else type(tensor).__name__
                )
                raise ExportError(
                    f"the example input holds a {kind}",
                    expected="tensors whose first dimension is the batch, as in (1, 3, 224, 224)",
                )
        kwargs = {key: _plain(t) for key, t in kwargs.items()}
        return cls(tuple(map(_plain, args)), kwargs, settings)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in the order of the ONNX inputs."""
        return (*self.args, *self.kwargs.values())

    @property
    def names(self) -> list[str]:
        """The names of the ONNX inputs."""
        count = len(self.tensors)
        return ["input"] if count == 1 else [f"input_{i}" for i in range(count)]

    def replaced(self, tensors: tuple[Tensor, ...]) -> Example:
        """Return this example with other values, in the same order."""
        count = len(self.args)
        kwargs = dict(zip(self.kwargs, tensors[count:], strict=True))
        return Example(tensors[:count], kwargs, self.settings)

    def fix_settings(self, module: nn.Module) -> None:
        """Let ``module`` run with these settings whenever it is given the tensors alone."""
        if self.settings:
            fill = functools.partial(_filled, self.settings)
            module.register_forward_pre_hook(fill, with_kwargs=True)

    def of_batch(self, size: int) -> Example:
        """Return this example repeated or cut to ``size`` rows."""
        rows = [torch.arange(size) % tensor.shape[0] for tensor in self.tensors]
        return self.replaced(tuple(t[index] for t, index in zip(self.tensors, rows, strict=True)))


def checked_opset(opset: int | None) -> int:
    """Return ``opset``, or the default.

    Raises:
        ExportError: torch or a runtime does not know it.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} cannot be written", expected=f"{OPSETS[0]} to {OPSETS[-1]}"
        )
    return opset


def frozen_copy(model: nn.Module, outputs: Sequence[str] | None = None) -> nn.Module:
    """Return a copy of ``model`` on the CPU, in fp32 and eval mode, out of any wrapper.

    It returns the ``outputs`` at these places, in its order; all if None. A detector of torchvision
    becomes one that returns boxes before NMS, for any batch.
    """
    twin = full_copy(network_of(model))
    twin = before_nms(twin) or twin
    set_mode(twin, training=False)
    # A traced graph cannot write into its inputs, as some networks do.
    twin.register_forward_pre_hook(lambda _, *given: copied(given), with_kwargs=True)
    if outputs is not None:

        def choose(_module: nn.Module, _given: Any, output: Any) -> Any:
            found = chosen_outputs(named_tensors(output), outputs, where=type(model).__name__)
            return found[0][1] if len(found) == 1 else tuple(tensor for _, tensor in found)

        twin.register_forward_hook(choose)
    return twin.cpu().float().requires_grad_(False)


def _filled(
    settings: Mapping[int | str, Any], _module: nn.Module, args: Sequence[Any], kwargs: Any
) -> Any:
    """Return the arguments of a call with the settings among the tensors."""
    tensors, named = iter(args), {k: v for k, v in settings.items() if isinstance(k, str)}
    places = range(len(args) + len(settings) - len(named))
    return tuple(settings[i] if i in settings else next(tensors) for i in places), kwargs | named


@dataclass(frozen=True)
class Free:
    """Which sizes of the inputs are free dimensions of the graph."""

    batch: bool = True
    size: bool = False  # height and width of images (B, C, H, W), or all after the channels

    def shapes(self, example: Example) -> Any:
        """Return what torch.export takes for dynamic shapes; None if nothing is free."""
        if not self.batch and not self.size:
            return None
        batch: dict[int, Any] = {0: torch.export.Dim("batch")} if self.batch else {}
        rows = [
            batch | dict.fromkeys(range(2, t.ndim if self.size else 0), torch.export.Dim.DYNAMIC)
            for t in example.tensors
        ]
        return tuple(rows) if example.args else dict(zip(example.kwargs, rows, strict=True))


def convert(module: nn.Module, example: Example, opset: int, free: Free) -> torch.onnx.ONNXProgram:
    """Return the dynamo exporter's program of ``module``, without traces of this machine.

    Raises:
        ExportError: the module cannot be traced, and the message names the line of its code; or
            the trace holds for one batch or size where it is to be free.
    """
    if free.batch and example.tensors[0].shape[0] < 2:
        example = example.of_batch(2)  # a batch of one would be taken for a constant
    shapes = free.shapes(example)
    images = example.tensors[0].shape[0]
    fix = "Mend its forward" + ", or export with dynamic_batch=False (--fixed-batch)" * free.batch
    what = f"its forward pass fails on a batch of {images}"
    with torch.no_grad(), boundary(ExportError, what, fix=fix):
        answer = without_traces(module)(*example.args, **example.kwargs)
    names, order = _outputs(answer)
    module = without_traces(module)  # what tracing caches on it has no values
    if example.settings or not _is_plain(answer):
        module = _Flat(module)
        if shapes is not None:  # of a forward that takes *args and **kwargs
            shapes = {"kwargs" if isinstance(shapes, dict) else "args": shapes}
    with _quiet(), _transforms_unasked(), _AsRuntimesRead():
        try:
            program = torch.onnx.export(
                module,
                example.args,
                kwargs=example.kwargs,
                input_names=example.names,
                output_names=names,
                opset_version=opset,
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        except Exception as error:  # whatever the user's code raises
            raise _cannot_trace(error, free) from error
    if program is None:
        raise ExportError("the exporter returned nothing")
    outputs = program.model.graph.outputs
    if len(outputs) == len(order):
        outputs[:] = [outputs[i] for i in order]
    if free.batch:
        _name_batch(program.model)
    if free.size:
        _name_sizes(program.model)
    _keep_scopes_only(program.model)
    return program


def _keep_scopes_only(graph: ir.Model) -> None:
    """Remove everything the exporter wrote about its machine; keep module paths of nodes."""
    graph.doc_string = graph.graph.doc_string = None
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props[SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _name_sizes(model: ir.Model) -> None:
    """Call the free dimensions of images "height" and "width", whatever torch called them."""
    names = {4: ("height", "width"), 5: ("depth", "height", "width")}
    for value in model.graph.inputs:
        shape = value.shape
        if shape is None:
            continue
        for dim in range(2, len(shape)):
            if isinstance(shape[dim], int):
                raise ExportError(
                    f"its code fixes dimension {dim} of {value.name!r} to {shape[dim]}",
                    fix="Take sizes from x.shape, or export without dynamic_size (--fixed-size)",
                )
            if len(shape) in names:
                shape[dim] = ir.SymbolicDim(names[len(shape)][dim - 2])


def _name_batch(model: ir.Model) -> None:
    """Call the free first dimension of every input and output "batch", whatever torch called it."""
    for value in model.graph.inputs:
        if value.shape is not None and isinstance(value.shape[0], int):
            raise ExportError(
                f"its code fixes the batch to {value.shape[0]}",
                fix="Take the batch from x.shape[0], or export with dynamic_batch=False "
                "(--fixed-batch)",
            )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape[0] = ir.SymbolicDim("batch")


def module_outputs(module: nn.Module, example: Example) -> list[Tensor]:
    """Return what ``module`` answers, as a flat list of tensors; ``module`` stays as it is.

    It is the second answer: of a network with a hidden state it differs from what was traced.
    """
    with torch.no_grad():
        dry = without_traces(module)
        tensors_of(dry(*example.args, **example.kwargs))
        return tensors_of(dry(*example.args, **example.kwargs))


def without_traces(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` for a dry run, with the same parameters and buffers.

    What a forward caches on its modules, a grid of the size it saw, stays on the copy: on the
    network itself it would fix that size in the graph.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin: nn.Module = copy.deepcopy(module, shared)
    return twin


class _Flat(nn.Module):
    """A network whose outputs are a tuple of tensors: torch traces no own classes of outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the tensors of what the network returns, in its order."""
        output = self.network(*args, **kwargs)
        return tuple(leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor))


class _AsRuntimesRead(WatchedCalls):
    """Calls that torch cannot export, or writes as what runtimes do not read, said in other ops."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, or what computes the same."""
        written = _WRITTEN.get(func)
        return func(*args, **kwargs) if written is None else written(*args, **kwargs)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention over windows or single heads, seen as (B, heads, N, C): torch exports no other."""
    kwargs = kwargs | dict(zip(_ATTENTION, args, strict=False))
    lead = kwargs["query"].shape[:-2]
    if len(lead) == 2:
        return F.scaled_dot_product_attention(**kwargs)
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.dim() > 2:
        kwargs["attn_mask"] = _of_4_dimensions(mask.expand(*lead, *mask.shape[-2:]))
    for name in ("query", "key", "value"):
        kwargs[name] = _of_4_dimensions(kwargs[name])
    found = F.scaled_dot_product_attention(**kwargs)
    return found.reshape(*lead, *found.shape[-2:])


def _of_4_dimensions(tensor: Tensor) -> Tensor:
    """Return (..., heads, N, C) as (B, heads, N, C), one head where there is no such dimension."""
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.flatten(0, -4)


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Tensor:
    """Circular padding as slices side by side: OpenVINO reads no Pad that wraps."""
    if mode != "circular" or min(pad) < 0:
        return F.pad(input, pad, mode, value)
    for dim, before, after in zip(itertools.count(-1, -1), pad[::2], pad[1::2], strict=False):
        end = input.narrow(dim, input.shape[dim] - before, before)
        input = torch.cat([end, input, input.narrow(dim, 0, after)], dim)
    return input


def _renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """A limit on the norms along a dimension: torch's exporter crashes on the op."""
    others = [d for d in range(input.dim()) if d != dim % input.dim()]
    norm = torch.linalg.vector_norm(input, p, others, keepdim=True)
    return input * torch.where(norm > maxnorm, maxnorm / (norm + 1e-7), 1.0)


_WRITTEN: dict[Any, Callable[..., Tensor]] = {
    # torch's exporter crashes on a network that computes its weights by ``weight.data = ...``
    Tensor.data.__get__: Tensor.detach,  # type: ignore[attr-defined]
    Tensor.data.__set__: Tensor.copy_,  # type: ignore[attr-defined]
    F.scaled_dot_product_attention: _attention,
    F.pad: _pad,
    torch.renorm: _renorm,
    Tensor.renorm: _renorm,
}


@contextlib.contextmanager
def _transforms_unasked() -> Iterator[None]:
    """Let torchvision's transforms run without questions to values, which no trace can answer.

    It asks whether a tensor holds a zero before it normalizes (the dry run before the trace has
    asked), and draws the strength of a blur where both its ends are one.
    """
    before = []
    for place, name, written in _UNASKED:
        module, _, held = place.partition(":")
        owner: Any = sys.modules.get(module)
        owner = getattr(owner, held, None) if held else owner
        if name in vars(owner or object):
            before.append((owner, name, vars(owner)[name]))
            setattr(owner, name, written(vars(owner)[name]))
    try:
        yield
    finally:
        for owner, name, kept in before:
            setattr(owner, name, kept)


def _normalize(tensor: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    """Images (..., C, H, W) less ``mean``, over ``std``, both (C,), as torchvision does."""
    mean, std = (
        torch.as_tensor(each, dtype=tensor.dtype, device=tensor.device).reshape(-1, 1, 1)
        for each in (mean, std)
    )
    return tensor.sub_(mean).div_(std) if inplace else tensor.sub(mean).div(std)


def _drawn_between(draw: Any) -> Any:
    """Return the draw of a number between two, which is one of them where both are the same."""
    return staticmethod(lambda low, high: low if low == high else draw.__func__(low, high))


def _blurred_by(make: Any) -> Any:
    """Return what makes the numbers of a blur, none of them drawn where both ends are the same."""

    def made(blur: Any, images: Any) -> dict[str, Any]:
        low, high = blur.sigma
        found: dict[str, Any] = {"sigma": [low, high]} if low == high else make(blur, images)
        return found

    return made


_UNASKED: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("torchvision.transforms._functional_tensor", "normalize", lambda _: _normalize),
    ("torchvision.transforms.transforms:GaussianBlur", "get_params", _drawn_between),
    ("torchvision.transforms.v2._misc:GaussianBlur", "make_params", _blurred_by),
    ("torchvision.transforms.v2._misc:GaussianBlur", "_get_params", _blurred_by),
)


def _is_plain(answer: Any) -> bool:
    """Say whether torch sees in what a network returned the tensors that we do.

    It does not look into own classes, and sees a list that stands in two places twice.
    """
    seen = torch.utils._pytree.tree_leaves(answer)
    if not all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in seen):
        return False
    ours = sum(isinstance(leaf, Tensor) for _, leaf in leaves(answer))
    return sum(isinstance(leaf, Tensor) for leaf in seen) == ours


def _outputs(answer: Any) -> tuple[list[str], list[int]]:
    """Return names for the outputs in the network's order, and the order they are written in."""
    given = [leaf for _, leaf in leaves(answer) if isinstance(leaf, Tensor)]
    if len(given) < 2:
        return ["logits"] * len(given), list(range(len(given)))
    place, first = named_tensors(answer)[0]
    main = next(i for i, tensor in enumerate(given) if tensor is first)
    order = [main, *(i for i in range(len(given)) if i != main)]
    names = [f"output_{order.index(i)}" for i in range(len(given))]
    if place == "logits":
        names[main] = place
    return names, order


_SYMBOLIC = re.compile("Unsupported attribute type.*SymbolicTensor")


def _cannot_trace(error: Exception, free: Free) -> ExportError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip()
    if _SYMBOLIC.search(text):
        text = "an option of an op (the groups of a convolution, say) depends on a size left free"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(cause).__name__]
    user = re.findall(r'File "([^"]+)", line (\d+), in \w+\s*\n\s*(.+)', text)
    where = f"{user[-1][0]}:{user[-1][1]}: {user[-1][2].strip()}" if user else ""
    return ExportError(
        f"torch cannot trace this network: {' '.join(lines[: 2 if lines[0][-1] == ':' else 1])}",
        where=where,
        fix="Python that depends on the values of tensors must become torch.where or a module "
        "attribute"
        + "; if it depends on the batch size, export with dynamic_batch=False (--fixed-batch)"
        * free.batch
        + "; if it depends on the image size, export without dynamic_size (--fixed-size)"
        * free.size,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter prints, warns and logs, and leave the RNG as found."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor
