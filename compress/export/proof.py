"""Compare an ONNX file with torch, and name the first node that differs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.errors import ExportError, reason_of
from compress.export.conversion import Example, Free, module_outputs
from compress.graph.ends import OUTPUT, Nms, Preprocess
from compress.modules import full_copy

TOLERANCE = 1e-4  # largest difference, relative to the largest magnitude of an output
SLACK = 10.0  # how many times torch's own fp32 rounding error ONNX Runtime may be off
LARGEST_ROUNDING = 0.01  # what changes more than this with its last digits hangs on rounding
LAST_DIGIT = 1e-5  # of the largest value of an input: as far as runtimes round apart in the end
PROBES = 8
NODE_TOLERANCE = 1e-3
MADE_UP_BOXES = 300  # that NMS at the end of a graph is tried on


def check_export(
    path: Path,
    module: nn.Module,
    example: Example,
    traced: torch.export.ExportedProgram | None,
    *,
    images: Tensor | None = None,
) -> None:
    """Compare the ONNX file with ``module`` on the example, random inputs and ``images``.

    Where two scores of a selection are equal (TopK, NMS), float32 leaves it to each runtime which
    goes first. An input whose last digits change what torch itself answers decides nothing, nor
    does one for which its answers overflow; the others do, and there must be one.

    Raises:
        ExportError: they differ; the message names the first node that does. Or no input decides.
    """
    session = _session(path)
    is_decided = False
    shape = session.get_inputs()[0].shape
    free = Free(isinstance(shape[0], str), any(isinstance(size, str) for size in shape[2:]))
    for label, inputs in _trials(example, images, free):
        reference = _answers(module, inputs, label)
        answers = _run(session, inputs, label)
        worst = difference(answers, reference)
        if worst <= TOLERANCE or _is_rounding(module, inputs, answers, reference):
            is_decided = True
            continue
        if np.isfinite(worst) and _hangs_on_rounding(module, inputs, reference):
            continue
        if not all(answer.isfinite().all() for answer in reference):
            continue
        raise ExportError(
            f"ONNX Runtime differs from torch by {worst:.2g} of the output's magnitude on {label}"
            f"{_first_divergence(path, traced, inputs)}",
            expected=f"at most {TOLERANCE:g}",
            fix="Please report this network; as a way around it, another opset may convert it well",
        )
    if not is_decided:
        raise ExportError(
            "ONNX Runtime and torch cannot be compared: on every input that was tried, rounding "
            "decides what torch itself answers, or its answers overflow",
            expected="an input with finite answers, which do not change when its last digits do",
            fix="Give images that the network was trained for (check_images=)",
        )


def check_ends(
    path: Path, module: nn.Module, example: Example, preprocess: Preprocess | None, *, softmax: bool
) -> None:
    """Compare the file with pre- and post-processing inside with torch doing the same outside.

    Raises:
        ExportError: they differ.
    """
    inputs = example.tensors[0]
    feed = inputs
    if preprocess is not None:
        size, channels, height, width = inputs.shape
        generator = torch.Generator().manual_seed(0)
        feed = torch.randint(
            0, 256, (size, height, width, channels), dtype=torch.uint8, generator=generator
        )
        inputs = preprocess(feed)
    reference = module_outputs(module, Example((inputs,), {}))
    if softmax:
        reference = [reference[0].softmax(1)]
    answers = [torch.from_numpy(a) for a in _session(path).run(None, {"input": feed.numpy()})]
    what = "with preprocessing or softmax in the graph ONNX Runtime differs from torch by"
    _check_difference(answers, reference, what, "of the output's magnitude")


def check_nms(model: ir.Model, heads: ir.Value, nms: Nms) -> None:
    """Compare NMS at the end of a graph with torchvision's, on made-up boxes and scores.

    Scores all differ and sides are whole: which of two equal boxes is kept, and how an overlap at
    the limit is rounded, may differ. ``heads`` are the boxes before NMS, (B, 4 + K, A).

    Raises:
        ExportError: they differ.
    """
    whole = ir.from_proto(ir.to_proto(model))
    graph = ir.convenience.extract(whole.graph, [str(heads.name)], [OUTPUT])
    graph.name = "nms"
    session = _session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    shape: Any = heads.shape
    batch_size, rows, places = shape
    random, some = np.random.default_rng(0), min(places, MADE_UP_BOXES)
    for batch in (batch_size,) if isinstance(batch_size, int) else (1, 2):
        made = np.zeros((batch, rows, places), np.float32)
        made[:, :2, :some] = random.integers(0, 200, (batch, 2, some))
        made[:, 2:4, :some] = 2 * random.integers(5, 40, (batch, 2, some))
        count = (rows - 4) * some
        for each in made:
            each[4:, :some] = (random.permutation(count).reshape(-1, some) + 1) / (count + 1)
        answers = [torch.from_numpy(each) for each in session.run(None, {heads.name: made})]
        expected = [torch.from_numpy(nms.rows(made))]
        what = "boxes after NMS differ from torchvision's by"
        _check_difference(answers, expected, what, "of the largest")


def _check_difference(
    answers: Iterable[Tensor], reference: Iterable[Tensor], what: str, unit: str
) -> None:
    worst = difference(answers, reference)
    if worst > TOLERANCE:
        raise ExportError(f"{what} {worst:.2g} {unit}", expected=f"at most {TOLERANCE:g}")


def difference(answers: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Return the largest difference over all outputs, relative to each output's magnitude."""
    worst = 0.0
    for answer, expected in zip(answers, reference, strict=True):
        if answer.shape != expected.shape:
            return float("inf")
        scale = max(float(expected.abs().max()), 1e-6)
        gap = float((answer.double() - expected.double()).abs().max()) / scale
        worst = max(worst, gap if np.isfinite(gap) else float("inf"))
    return worst


def _trials(example: Example, images: Tensor | None, free: Free) -> Iterable[tuple[str, Example]]:
    dynamic = free.batch
    yield "the example input", example
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 3) if dynamic else (example.tensors[0].shape[0],)
    for size in sizes:
        rows = example.of_batch(size)
        drawn = tuple(_random_like(tensor, generator) for tensor in rows.tensors)
        yield f"random inputs of batch {size}", rows.replaced(drawn)
    for dim in (2, 3) if free.size else ():  # twice as high, then twice as wide
        longer = [torch.cat([t, t], dim) if t.ndim > dim else t for t in example.tensors]
        drawn = tuple(_random_like(tensor, generator) for tensor in longer)
        yield f"random inputs of shape {tuple(drawn[0].shape)}", example.replaced(drawn)
    if images is not None:
        size = example.tensors[0].shape[0]
        some = images[:8].detach().cpu().float()
        rows = example.replaced((some,))
        yield "the given images", rows if dynamic else rows.of_batch(size)


def _answers(module: nn.Module, inputs: Example, label: str) -> list[Tensor]:
    try:
        return module_outputs(module, inputs)
    except Exception as error:
        raise ExportError(
            f"the network itself fails on {label}: {(str(error).splitlines() or [repr(error)])[0]}",
            fix="Export with dynamic_batch=False (--fixed-batch) if it works for one batch only, "
            "without dynamic_size (--fixed-size) if for one image size",
        ) from error


def _run(session: Any, inputs: Example, label: str) -> list[Tensor]:
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(inputs.tensors):
        raise ExportError(
            f"the network does not use {', '.join(sorted(set(inputs.names) - set(names)))}",
            fix="Leave it out of the example input",
        )
    try:
        return [torch.from_numpy(a) for a in session.run(None, _feeds(session, inputs))]
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime fails on {label}: {reason_of(str(error))}",
            fix="Export with dynamic_batch=False if the network works for one batch size only",
        ) from error


def _feeds(session: Any, inputs: Example) -> dict[str, np.ndarray]:
    names = [entry.name for entry in session.get_inputs()]
    return dict(zip(names, (tensor.numpy() for tensor in inputs.tensors), strict=True))


def _is_rounding(
    module: nn.Module, inputs: Example, answers: list[Tensor], reference: list[Tensor]
) -> bool:
    """Return whether ONNX Runtime is about as near to the float64 truth as torch's fp32 is."""
    truth = _in_float64(module, inputs)
    if truth is None:
        return False
    rounding = difference(reference, truth)
    return rounding < LARGEST_ROUNDING and difference(answers, truth) <= SLACK * rounding


def _hangs_on_rounding(module: nn.Module, inputs: Example, reference: list[Tensor]) -> bool:
    """Return whether float64, or another last digit of the input, changes torch's own answer."""
    truth = _in_float64(module, inputs)
    others = [] if truth is None else [truth]
    generator = torch.Generator().manual_seed(0)
    for _ in range(PROBES):
        nearby = tuple(
            t + LAST_DIGIT * t.abs().max() * torch.randn(t.shape, generator=generator)
            if t.is_floating_point()
            else t
            for t in inputs.tensors
        )
        others.append(module_outputs(module, inputs.replaced(nearby)))
    return any(difference(other, reference) >= LARGEST_ROUNDING for other in others)


def _in_float64(module: nn.Module, inputs: Example) -> list[Tensor] | None:
    """Return what a copy of ``module`` in float64 answers; None where it casts inside."""
    doubled = tuple(t.double() if t.is_floating_point() else t for t in inputs.tensors)
    try:
        return module_outputs(full_copy(module).double(), inputs.replaced(doubled))
    except RuntimeError:
        return None


def _first_divergence(
    path: Path, traced: torch.export.ExportedProgram | None, inputs: Example
) -> str:
    """Return ``", first at node ..."``, found by running both graphs value by value."""
    if traced is None:
        return ""
    expected = _traced_values(traced, inputs)
    model = onnx.load(str(path))
    present = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name in expected and name not in present:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = _session(model.SerializeToString(), plain=True)
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(None, _feeds(session, inputs)), strict=True))
    for node in model.graph.node:
        for name in set(node.output) & set(values) & set(expected):
            gap = difference([torch.from_numpy(np.asarray(values[name]))], [expected[name]])
            if gap > NODE_TOLERANCE:
                return (
                    f"; the first node that differs is {node.name} ({node.op_type}), by {gap:.2g}"
                )
    return (
        "; every node agrees with the traced program, so the trace itself differs from the module"
    )


def _traced_values(traced: torch.export.ExportedProgram, inputs: Example) -> dict[str, Tensor]:
    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                values[n.name] = value.detach().clone()
            return value

    values: dict[str, Tensor] = {}
    with torch.no_grad():
        Recorder(traced.module(check_guards=False)).run(*inputs.tensors)
    return values


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    mean, spread = float(tensor.mean()), float(tensor.std()) if tensor.numel() > 1 else 0.0
    is_flat = spread <= LAST_DIGIT * abs(mean)  # an image of one color has the spread of rounding
    return torch.randn(tensor.shape, generator=generator) * (1.0 if is_flat else spread) + mean


def _session(source: Path | bytes, *, plain: bool = False) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = source if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the graph: {reason_of(str(error))}") from error
