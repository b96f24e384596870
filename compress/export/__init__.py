"""torch -> ONNX: BatchNorm folded, pre- and post-processing inside, checked against torch.

The fp32 ONNX file is the seam of the whole tool: nothing after it knows torch. It therefore counts
as written only when ONNX Runtime gave the same answers as the module it came from.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from compress.artifact import check_no_folder, replacing
from compress.errors import CompressError, ExportError, boundary
from compress.export import conversion, proof
from compress.export.conversion import DEFAULT_OPSET, Free
from compress.graph import ends
from compress.graph.ends import Nms, Preprocess
from compress.graph.metadata import PREFIX, as_text, metadata
from compress.modules import with_gradients
from compress.modules.outputs import as_places

__all__ = ["DEFAULT_OPSET", "Preprocess", "export_onnx", "read_metadata"]

LARGEST_SINGLE_FILE = 2**31 - 2**24  # bytes of weights; protobuf ends at 2 GiB


@with_gradients()
def export_onnx(  # noqa: PLR0913 - the published signature; each option stands alone
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    metadata: Mapping[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    softmax: bool = False,
    nms: Nms | None = None,
    check_images: Tensor | None = None,
    outputs: Iterable[str | int] | str | int | None = None,
) -> Path:
    """Write ``model`` as an ONNX file whose outputs equal torch's, or raise.

    The file has one input "input" and one output "logits" ("probabilities" with ``softmax``);
    several are called "input_0", "output_0" and so on. BatchNorm is folded into convolutions,
    constants are folded, parameter names are initializer names, and every node keeps the module
    path it came from (``pkg.torch.onnx.name_scopes``). Stack traces, which hold paths of the
    machine, are removed. Both torch and ONNX Runtime (CPU, fp32) then answer the example, random
    inputs of other batch sizes, and ``check_images``.

    Args:
        model: In any mode, on any device, in a wrapper or not; left as found: copies run. Exported
            in eval mode and fp32.
        example_input: What ``model`` takes, each with the batch first: (B, C, H, W), normalized;
            or the shape of one input. Numbers, flags and texts among them are fixed in the graph.
        path: File to write. Networks over 2 GB put their weights beside it, in ``NAME.data``.
        opset: ONNX operator set; 20 if absent, which every supported runtime reads.
        dynamic_batch: Whether the batch is a free dimension of the graph; else the example's.
        dynamic_size: Whether height and width are free dimensions, too; else the example's.
        metadata: JSON-able facts kept in the file (labels, mean, std, lineage, ...); see
            ``read_metadata``. "weights_sha256" is added.
        preprocess: Take uint8 (B, H, W, C) images in 0..255 and normalize inside the graph.
        softmax: Return probabilities instead of logits.
        nms: Return boxes after NMS, (B, M, 6), instead of before it, (B, 4 + K, A).
        check_images: Real inputs to check on as well, (B, C, H, W) normalized like the example.
        outputs: Places of the outputs that the file has, such as ``"0"`` or ``"boxes"``; all if
            absent. What only others need is left out.

    Returns:
        ``path``.

    Raises:
        ExportError: torch cannot trace the network, an option does not fit it, or ONNX Runtime
            disagrees with torch; the message then names the first node that differs. No file is
            written.
    """
    target, name = Path(path), type(model).__name__
    opset = conversion.checked_opset(opset)
    check_no_folder(target)
    try:
        module = conversion.frozen_copy(model, as_places(outputs))
        example = conversion.Example.of(example_input)
        example.fix_settings(module)
        free = Free(dynamic_batch, dynamic_size)
        program = conversion.convert(module, example, opset, free)
        facts = dict(metadata or {}) | {"weights_sha256": weights_sha256(module)}
        graph = program.model
        with writing(graph, target, facts) as written:
            proof.check_export(
                written, module, example, program.exported_program, images=check_images
            )
            if preprocess is not None or softmax:
                ends.attach(graph, preprocess, softmax=softmax)
                facts |= ends.wrapping_facts(preprocess, softmax)
                _save(graph, written, facts)
                proof.check_ends(written, module, example, preprocess, softmax=softmax)
            if nms is not None:
                heads = graph.graph.outputs[0]
                nms.attach(graph)
                proof.check_nms(graph, heads, nms)
                _save(graph, written, facts)
    except CompressError as error:
        raise (error if error.where == name else error.within(name)) from None
    return target


def weights_sha256(module: nn.Module) -> str:
    """Return a hash of every parameter and buffer of ``module``, by name and value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().numpy()))
    return digest.hexdigest()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what ``export_onnx`` noted in the file: labels, mean, std, lineage and so on.

    Raises:
        ExportError: the file is absent or is no ONNX.
    """
    with boundary(ExportError, "cannot be read as ONNX", where=str(path)):
        model = onnx.load(str(path), load_external_data=False)
        return metadata(model)


@contextlib.contextmanager
def writing(model: ir.Model, target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary file that holds ``model``; it becomes ``target`` if the block succeeds."""
    data = target.with_name(f"{target.name}.data")
    before = data.stat().st_mtime_ns if data.exists() else None
    try:
        with replacing(target) as temporary:
            _save(model, temporary, facts, data=data)
            yield temporary
    except BaseException:
        if data.exists() and data.stat().st_mtime_ns != before:
            data.unlink()
        raise


def _save(model: ir.Model, path: Path, facts: Mapping[str, Any], data: Path | None = None) -> None:
    """Write ``model`` with ``facts`` to ``path``, and weights over 2 GB to ``data``."""
    model.metadata_props.clear()
    model.metadata_props.update({f"{PREFIX}{key}": as_text(value) for key, value in facts.items()})
    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if weights < LARGEST_SINGLE_FILE:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
    elif data is None:
        raise ExportError(f"{weights} bytes of weights do not fit one ONNX file")
    else:
        ir.save(model, path, external_data=data.name)
        onnx.checker.check_model(str(path))
