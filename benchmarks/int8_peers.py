"""What others make of the same ONNX file and images: ONNX Runtime's quantizer and NNCF."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PEERS = ("ort defaults", "ort tuned", "ort tensorrt form", "nncf")


def quantize_by(peer: str, path: Path, images: np.ndarray, out: Path) -> None:
    """Write what ``peer`` makes of an fp32 ONNX file.

    "ort defaults" is quantize_static with a data reader and nothing else; "ort tuned" has weights
    per channel, pre-processing and percentile ranges; "ort tensorrt form" is its best symmetric
    graph for TensorRT; "nncf" is nncf.quantize with its defaults.
    """
    if peer == "nncf":
        _nncf(path, images, out)
        return
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    weighted = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
    form: dict[str, Any] = {
        "ort defaults": {},
        "ort tuned": {
            "per_channel": True,
            "calibrate_method": quantization.CalibrationMethod.Percentile,
            "weight_type": quantization.QuantType.QInt8,
            "activation_type": quantization.QuantType.QUInt8,
        },
        "ort tensorrt form": {
            "per_channel": True,
            "weight_type": quantization.QuantType.QInt8,
            "activation_type": quantization.QuantType.QInt8,
            "op_types_to_quantize": weighted,
            "extra_options": {
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": True,
                "OpTypesToExcludeOutputQuantization": weighted,
                "DedicatedQDQPair": False,
                "QDQDisableWeightAdjustForInt32Bias": True,
            },
        },
    }[peer]
    with tempfile.TemporaryDirectory() as folder:
        source = path
        if form:
            source = Path(folder) / "prepared.onnx"
            quant_pre_process(str(path), str(source), skip_symbolic_shape=True)
        quantization.quantize_static(str(source), str(out), Reader(images), **form)


class Reader:
    """Hands images to ONNX Runtime one by one."""

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.next = images, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next image, or None at the end."""
        self.next += 1
        if self.next > len(self.images):
            return None
        return {"input": self.images[self.next - 1 : self.next]}


def _nncf(path: Path, images: np.ndarray, out: Path) -> None:
    import onnx

    from compress.quantize.nncf_ranges import import_nncf

    nncf = import_nncf()
    items = [{"input": images[i : i + 1]} for i in range(len(images))]
    data = nncf.Dataset(items)
    onnx.save(nncf.quantize(onnx.load(str(path)), data, subset_size=len(items)), str(out))
