"""Anybody's artifacts next to each other: timed in the same rounds, compared on the same images."""

from compress.side_by_side.comparing import Compared, compare_artifacts
from compress.side_by_side.timing import Benched, bench_artifacts

__all__ = ["Benched", "Compared", "bench_artifacts", "compare_artifacts"]
