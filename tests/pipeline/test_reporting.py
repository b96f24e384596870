"""Parts of the report that are made from plans and from what the stages recorded."""

from __future__ import annotations

from compress.pipeline.reporting import notes_of


def test_what_several_int8_forms_share_is_told_once() -> None:
    shared = "judged on 16 images: an SQNR may be some dB off; give 64 or more"
    notes = {
        "int8-onnxruntime": ("mse ranges: 30.0 dB", shared, "a stays in float: slow"),
        "int8-openvino": ("mse ranges: 31.0 dB", "a stays in float: slow", shared),
        "int8-tensorrt": ("a stays in float: slow", "b stays in float: slow"),
    }
    assert list(notes_of(notes.items())) == [
        "int8-onnxruntime: mse ranges: 30.0 dB",
        f"int8-onnxruntime, int8-openvino: {shared}",
        "int8-onnxruntime, int8-openvino: a stays in float: slow",
        "int8-openvino: mse ranges: 31.0 dB",
        "int8-tensorrt: a and b stay in float: slow",
    ]
