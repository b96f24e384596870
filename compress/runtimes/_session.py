"""What all runtimes share: requests and graphs to build from, what sessions take and give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from onnx import ModelProto, helper

from compress.errors import EngineError, UnknownNameError, UsageError
from compress.graph import files
from compress.graph.shapes import real_inputs

PRECISIONS = ("fp32", "fp16", "int8")
Opens = Literal["onnx", "engine", "network"]  # what ``open`` takes


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a session."""

    name: str
    shape: tuple[int | str, ...] | None  # a name stands for a free dimension; None: not known
    dtype: str | None  # numpy's name, "float32"; None: not known
    batch: tuple[int, int] | None = None  # smallest and largest, where an engine limits it


@dataclass(frozen=True)
class BuildRequest:
    """What an engine must be good for."""

    batch: tuple[int, int, int]
    precision: str | None

    @classmethod
    def checked(cls, batch: int | tuple[int, int, int], precision: str | None) -> BuildRequest:
        """Return a request.

        Raises:
            UsageError: the batches are not in order, or the precision has no such name.
        """
        sizes = (batch,) * 3 if isinstance(batch, int) else tuple(batch)
        whole = all(type(size) is int for size in sizes)
        if not whole or len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(
                f"batch {batch} cannot be built for",
                expected="MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX",
            )
        if precision is not None and precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        return cls((sizes[0], sizes[1], sizes[2]), precision)


class RawSession(Protocol):
    """What a runtime returns from ``open``: inputs reach it only when they fit."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return one array for each output."""
        ...

    def close(self) -> None:
        """Free everything; called once."""
        ...


class Session:
    """A loaded artifact that runs batches; what its engine would misread is refused, and why."""

    def __init__(self, raw: RawSession, where: str) -> None:
        self.inputs = raw.inputs
        self.outputs = raw.outputs
        self._raw: RawSession | None = raw
        self._where = where

    @property
    def raw(self) -> RawSession:
        """The runtime's own session.

        Raises:
            EngineError: the session is closed.
        """
        if self._raw is None:
            raise EngineError("the session is closed", where=self._where)
        return self._raw

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return one array for each output.

        Args:
            arrays: One for each input, of its dtype, the batch first. Not modified.

        Raises:
            EngineError: an array does not fit its input, or the runtime fails on it.
        """
        raw = self.raw
        if len(arrays) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise EngineError(
                f"{len(arrays)} arrays given", where=self._where, expected=f"one each for {names}"
            )
        for array, spec in zip(arrays, self.inputs, strict=True):
            _check_fits(array, spec, f"{self._where}: input {spec.name!r}")
        return raw.run(arrays)

    def close(self) -> None:
        """Free what the session holds; a second call does nothing."""
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_fits(array: object, spec: TensorSpec, where: str) -> None:
    is_array = isinstance(array, np.ndarray)
    if not isinstance(array, np.ndarray) or (not array.ndim and spec.shape != ()):
        raise EngineError(
            f"a {type(array).__name__}{' without a batch dimension' * is_array}",
            where=where,
            expected="a numpy array, the batch first",
        )
    if spec.dtype is not None and array.dtype != spec.dtype:
        raise EngineError(
            f"an array of {array.dtype}",
            where=where,
            expected=spec.dtype,
            fix=f"Pass array.astype(numpy.{spec.dtype})"
            if spec.dtype.startswith("float")
            else "Pass the image as it is, not normalized",
        )
    if spec.shape is not None and not _matches(array.shape, spec.shape):
        shown = ", ".join(map(str, spec.shape))
        raise EngineError(
            f"an array of shape {array.shape}", where=where, expected=f"shape ({shown})"
        )
    if not array.ndim:
        return
    if not array.shape[0]:
        raise EngineError("a batch of 0", where=where, expected="at least one row")
    low, high = spec.batch or (1, array.shape[0])
    if not low <= array.shape[0] <= high:
        raise EngineError(
            f"a batch of {array.shape[0]} is outside what this engine was built for",
            where=where,
            expected=f"{low} to {high}",
            fix=f"Build it again with --batch {low},{low},{max(high, array.shape[0])}",
        )


def _matches(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected, strict=True)
    )


def of_precision(path: Path, precision: str | None) -> ModelProto:
    """Return the graph in ``path``; converted to fp16 if asked for.

    Raises:
        EngineError: the file is damaged, or int8 is asked of a graph without Q/DQ nodes, or fp32
            of one with them.
    """
    model = files.load(path)
    has_qdq = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if precision == "int8" and not has_qdq:
        raise EngineError(
            "precision int8 was asked for, and the graph holds no Q/DQ nodes",
            where=str(path),
            fix="Quantize it first: compress quantize FILE.onnx --data DATA",
        )
    if precision == "fp32" and has_qdq:
        raise EngineError(
            "precision fp32 was asked for, and the graph holds Q/DQ nodes",
            where=str(path),
            fix="Build the ONNX file from before quantization",
        )
    if precision == "fp16":
        from compress.graph.fp16 import to_half

        model = to_half(model)
    return model


def inputs(model: ModelProto) -> list[dict[str, Any]]:
    """Return name, shape and dtype of every input, as JSON-able data."""
    return [
        {
            "name": value.name,
            "shape": [
                dim.dim_value if dim.dim_value > 0 else dim.dim_param or f"free_{axis}"
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            ],
            "dtype": helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
        }
        for value in real_inputs(model)
    ]
