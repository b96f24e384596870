"""The decision of how a graph is quantized, as data: saved, printed, diffed, edited, replayed."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from compress.artifact import read_json, write_json
from compress.errors import QuantizationError, UnknownNameError, boundary, first_problem

TARGETS = ("onnxruntime", "openvino", "tensorrt")
VERSION = 1
LARGEST = float(np.finfo(np.float32).max)

STRICT = ConfigDict(extra="forbid")
Value = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]  # finite in float32
Size = Annotated[float, Field(ge=0, le=LARGEST)]
Factor = Annotated[float, Field(gt=0, le=LARGEST)]


@dataclass(frozen=True)
class ActivationRange:
    """What of one tensor's values is kept; a target makes its own scale and zero point of it."""

    __pydantic_config__: ClassVar = STRICT

    low: Value  # lower end of the asymmetric range, at most 0
    high: Value  # upper end of the asymmetric range, at least 0
    limit: Size  # the symmetric range is [-limit, limit]; positive
    observer: str = ""  # what chose it
    seen: tuple[Value, Value] = (0.0, 0.0)  # smallest and largest value of the calibration images


@dataclass(frozen=True)
class WeightScales:
    """Symmetric scales of one weight; its integers lie in [-127, 127]."""

    __pydantic_config__: ClassVar = STRICT

    axis: int | None  # dimension with a scale of its own for each index; None = one scale for all
    scales: tuple[Factor, ...]  # one for each index along ``axis``, positive
    # The integers themselves (``pack_codes``), where rounding to nearest was improved on
    codes: str | None = None


@dataclass(frozen=True)
class Equalization:
    """Outputs of ``producer`` divided by ``factors``, inputs of ``consumer`` multiplied."""

    __pydantic_config__: ClassVar = STRICT

    producer: str  # node names; "" for none
    consumer: str
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class InputGrid:
    """Values that ``node`` reads: low + step * k in each channel, for k = 0..255."""

    __pydantic_config__: ClassVar = STRICT

    node: str  # a Conv
    steps: tuple[Factor, ...]  # of each input channel
    lows: tuple[Value, ...]  # of each input channel
    zero: Annotated[int, Field(ge=0, le=255)]  # the k that becomes 0

    @property
    def step(self) -> float:
        """The step that all channels are brought to."""
        return sum(self.steps) / len(self.steps)


@dataclass(frozen=True)
class QuantPlan:
    """How one fp32 graph is quantized. Tensors and nodes are named as in the prepared graph."""

    __pydantic_config__: ClassVar = STRICT

    target: str  # the runtime its corrections were matched for; its ranges serve any
    method: str = ""  # what made it
    # Range of each tensor that may be quantized
    activations: Mapping[str, ActivationRange] = field(default_factory=dict)
    # Scales of each weight; the largest magnitude / 127 where absent
    weights: Mapping[str, WeightScales] = field(default_factory=dict)
    # Corrected biases, by node
    biases: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    # Inputs that are brought to a grid that integers hold exactly
    grids: tuple[InputGrid, ...] = ()
    # Rescalings between neighbouring layers, applied in this order
    equalization: tuple[Equalization, ...] = ()
    float_nodes: Mapping[str, str] = field(default_factory=dict)  # nodes left in float, and why
    notes: tuple[str, ...] = ()  # what was decided, at what cost, and how far to trust it
    trials: tuple[str, ...] = ()  # what was tried on the way, and what it brought

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)

    def changed(self, **fields: Any) -> QuantPlan:
        """Return a copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def keep_float(self, nodes: Iterable[str], why: str) -> QuantPlan:
        """Return a copy that leaves ``nodes`` in float, with the biases that they had."""
        floating = dict.fromkeys(nodes, why)
        biases = {node: bias for node, bias in self.biases.items() if node not in floating}
        return self.changed(float_nodes={**self.float_nodes, **floating}, biases=biases)

    def without_weights(self) -> QuantPlan:
        """Return a copy that knows nothing of the weights' values, for weights trained since."""
        return self.changed(weights={}, biases={}, equalization=(), grids=())

    def to_json(self) -> dict[str, Any]:
        """Return this plan as JSON-able data."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> QuantPlan:
        """Return the plan that ``to_json`` wrote.

        Raises:
            QuantizationError: it is not such a plan, or holds a number that no scale can be; the
                message names the field.
        """
        what = f"is no quantization plan of version {VERSION}"
        fix = "Make it again with `compress quantize`"
        with boundary(QuantizationError, what, fix=fix):
            fields = dict(content)
            if (version := fields.pop("version")) != VERSION:
                raise ValueError(f"version {version!r}")
            try:
                return _SCHEMA.validate_python(fields)
            except ValidationError as error:
                raise QuantizationError(f"{what}: {first_problem(error)}", fix=fix) from None

    def save(self, path: Path | str) -> None:
        """Write this plan as JSON."""
        write_json(Path(path), json.loads(json.dumps(self.to_json())))

    @classmethod
    def load(cls, path: Path | str) -> QuantPlan:
        """Read a plan that ``save`` wrote.

        Raises:
            RunError: the file is absent or no JSON.
            QuantizationError: it holds no such plan.
        """
        content = read_json(Path(path))
        try:
            return cls.from_json(content)
        except QuantizationError as error:
            raise error.within(str(path)) from None


def pack_codes(codes: NDArray[np.int8]) -> str:
    """Return integers as text: zlib, then base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(codes).tobytes(), 6)).decode()


def unpack_codes(text: str, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Return the integers that ``pack_codes`` wrote.

    Raises:
        QuantizationError: they are damaged or not of this shape.
    """
    with boundary(QuantizationError, "the integers of a weight cannot be read"):
        packed = base64.b64decode(text, validate=True)
        wanted = math.prod(shape)
        flat = np.frombuffer(zlib.decompressobj().decompress(packed, wanted + 1), np.int8)
        return flat.reshape(shape)


_SCHEMA = TypeAdapter(QuantPlan)
