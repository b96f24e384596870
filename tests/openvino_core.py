"""One Core of OpenVINO for all tests.

Each Core gives the thread that compiles first a stack for signals, and on its end the one before.
Where of two the first ends first, that one is gone: the next signal, as of a subprocess that ends,
kills the process (2026.4).
"""

import functools

import pytest


@functools.cache
def _core():
    return pytest.importorskip("openvino").Core()


def compiled(source, *options):
    """Return a graph compiled for the CPU; skip the test where OpenVINO is not installed."""
    return _core().compile_model(str(source), "CPU", *options)
