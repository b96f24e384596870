"""Networks of other packages: planned, cut, proved, saved, reloaded and exported."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import architectures

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES, ids=lambda a: a.name)
def test_a_real_architecture_is_right_in_every_step(
    architecture: architectures.Architecture,
) -> None:
    if not architecture.installed:
        pytest.skip(f"{architecture.package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = architectures.try_out(architecture)
    assert row["right"], f"{row['step']}: {row.get('error')}"
    assert row["kept_macs"] <= architectures.KEEP_MACS
