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

    form = _options(peer)
    with tempfile.TemporaryDirectory() as folder:
        source = path
        if form:
            source = Path(folder) / "prepared.onnx"
            quant_pre_process(str(path), str(source), skip_symbolic_shape=True)
        quantization.quantize_static(str(source), str(out), Reader(images), **form)


def _options(peer: str) -> dict[str, Any]:
    """Return what quantize_static is told for one of ONNX Runtime's rows."""
    from onnxruntime import quantization

    weighted = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
    forms: dict[str, dict[str, Any]] = {
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
    }
    return forms[peer]


METHODS = ("minmax", "percentile", "entropy")
ON_FEEDS = (
    *(f"ort {method}" for method in METHODS),
    *(f"ort tensorrt form {method}" for method in METHODS),
    "nncf fast",
    "nncf full",
)


def quantize_feeds(peer: str, path: Path, feeds: list[dict[str, np.ndarray]], out: Path) -> None:
    """Write what ``peer``, one of ``ON_FEEDS``, makes of a file with any inputs.

    Older opsets are converted to 17, without which neither has a scale for each channel.
    """
    import onnx

    model = onnx.load(str(path))
    if next(o.version for o in model.opset_import if not o.domain) < 13:
        model = onnx.version_converter.convert_version(model, 17)
    if peer.startswith("nncf"):
        from compress.quantize.api import import_nncf

        nncf = import_nncf()
        full = {"fast_bias_correction": peer == "nncf fast"}
        onnx.save(nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), **full), out)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "opset.onnx"
        onnx.save(model, source)
        _ort(peer, source, feeds, out)


def _ort(peer: str, path: Path, feeds: list[dict[str, np.ndarray]], out: Path) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    form = "ort tensorrt form" if "tensorrt" in peer else "ort tuned"
    method = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
    chosen = getattr(quantization.CalibrationMethod, method[peer.split()[-1]])
    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    options = _options(form) | {"calibrate_method": chosen}
    quantization.quantize_static(str(prepared), str(out), Feeds(feeds), **options)


class Feeds:
    """Hands feeds to ONNX Runtime one by one."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next feed, or None at the end."""
        return next(self.feeds, None)


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

    from compress.quantize.api import import_nncf

    nncf = import_nncf()
    items = [{"input": images[i : i + 1]} for i in range(len(images))]
    data = nncf.Dataset(items)
    onnx.save(nncf.quantize(onnx.load(str(path)), data, subset_size=len(items)), str(out))
