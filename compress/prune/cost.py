"""MACs and parameters as a function of how many units every group keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from compress.groups import Network

Quantity = Literal["macs", "params"]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class CostModel:
    """What a network costs when group g keeps ``counts[g]`` units, without cutting anything.

    A group owns the same number of positions k for each of its units along a dimension of a tensor,
    so the length of that dimension is a linear function of the counts, and the size of a tensor is
    a product of at most two such lengths. Exact, and linear in the number of slices.

    Args:
        network: What ``trace`` returned.
    """

    def __init__(self, network: Network) -> None:
        shapes, layers = network.shapes, network.layers
        self.sizes: Counts = np.array([group.size for group in network.groups], dtype=np.int64)
        dims = network.owned
        tensors = sorted({t for t, _ in dims if t in layers or t in network.parameters})
        self._first = _Lengths(self.sizes, len(tensors))
        self._second = _Lengths(self.sizes, len(tensors))
        volume = np.ones(len(tensors))
        for row, tensor in enumerate(tensors):
            lengths = iter((self._first, self._second))
            for dim, length in enumerate(shapes[tensor]):
                if (tensor, dim) in dims:
                    next(lengths).add(row, length, dims[tensor, dim])
                else:
                    volume[row] *= length
        self._first.finish()
        self._second.finish()
        macs = [layers[t].macs_per_element if t in layers else 0 for t in tensors]
        counted = [t in network.parameters for t in tensors]
        self._factors: dict[Quantity, Floats] = {"macs": volume * macs, "params": volume * counted}
        self._fixed: dict[Quantity, float] = {"macs": 0.0, "params": 0.0}
        self._fixed["macs"] = network.macs - self.total("macs", self.sizes)
        self._fixed["params"] = network.params - self.total("params", self.sizes)

    def total(self, quantity: Quantity, counts: Counts) -> int:
        """Return the MACs of one image, or the parameters, with these counts."""
        product = self._first.at(counts) * self._second.at(counts)
        return round(float(self._factors[quantity] @ product) + self._fixed[quantity])

    def marginal(self, quantity: Quantity, counts: Counts) -> Floats:
        """Return what one unit of each group costs, at these counts: (groups,)."""
        factors = self._factors[quantity]
        through_first = self._first.slopes.T @ (factors * self._second.at(counts))
        through_second = self._second.slopes.T @ (factors * self._first.at(counts))
        marginal: Floats = np.asarray(through_first + through_second, dtype=np.float64)
        return marginal


class _Lengths:
    """Lengths of one dimension of many tensors: base + slopes @ counts; 1 where none is cut."""

    def __init__(self, sizes: Counts, tensors: int) -> None:
        self._sizes = sizes
        self._base = np.ones(tensors)
        self._entries: list[tuple[int, int, int]] = []

    def add(self, row: int, length: int, owned: Mapping[int, int]) -> None:
        """Say that group g owns ``owned[g]`` positions for each of its units in tensor ``row``."""
        self._base[row] = length - sum(k * int(self._sizes[g]) for g, k in owned.items())
        self._entries += [(row, g, k) for g, k in owned.items()]

    def finish(self) -> None:
        """Build the matrix of slopes: (tensors, groups)."""
        rows, groups, values = zip(*self._entries, strict=True) if self._entries else ((), (), ())
        self.slopes = sparse.csr_array(
            (np.array(values, dtype=np.float64), (np.array(rows, int), np.array(groups, int))),
            shape=(len(self._base), len(self._sizes)),
        )

    def at(self, counts: Counts) -> Floats:
        """Return the lengths at these counts: (tensors,)."""
        lengths: Floats = self._base + self.slopes @ counts
        return lengths
