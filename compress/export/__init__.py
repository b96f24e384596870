"""torch -> ONNX: BatchNorm folded, pre- and post-processing inside, checked against torch.

The fp32 ONNX file is the seam of the whole tool: nothing after it knows torch. It therefore counts
as written only when ONNX Runtime gave the same answers as the module it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.errors import CompressError
from compress.export import conversion, files, io_wrapping, proof
from compress.export.conversion import DEFAULT_OPSET, Free
from compress.export.files import read_metadata
from compress.export.io_wrapping import Preprocess
from compress.graph.nms import Nms
from compress.modules import with_gradients
from compress.modules.outputs import as_places

__all__ = ["DEFAULT_OPSET", "Preprocess", "export_onnx", "read_metadata"]


@with_gradients()
def export_onnx(  # noqa: PLR0913 - the published signature; each option stands alone
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
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
            or the shape of one input.
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
    try:
        module = conversion.frozen_copy(model, as_places(outputs))
        example = conversion.Example.of(example_input)
        free = Free(dynamic_batch, dynamic_size)
        program = conversion.convert(module, example, opset, free)
        facts = dict(metadata or {}) | {"weights_sha256": files.weights_sha256(module)}
        graph = program.model
        if dynamic_batch:
            files.name_batch(graph)
        if dynamic_size:
            files.name_sizes(graph)
        conversion.keep_scopes_only(graph)
        with files.writing(graph, target, facts) as written:
            proof.check_export(
                written, module, example, program.exported_program, images=check_images
            )
            if preprocess is not None or softmax:
                io_wrapping.attach(graph, preprocess, softmax=softmax)
                facts |= io_wrapping.wrapping_facts(preprocess, softmax)
                files.save_exported(graph, written, facts)
                proof.check_ends(written, module, example, preprocess, softmax=softmax)
            if nms is not None:
                heads = graph.graph.outputs[0]
                nms.attach(graph.graph)
                proof.check_nms(graph, heads, nms)
                files.save_exported(graph, written, facts)
    except CompressError as error:
        raise error.within(name) from None
    return target
