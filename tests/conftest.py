"""What all tests share: one thread for each process, untimed examples, the command line."""

import json
import os
import sys

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs several processes side by side
# no example is timed: the machine may do other things, and first calls import packages
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def compress(monkeypatch, capsys):
    """Call the command line in this process; returns (exit code, stdout, stderr)."""
    from compress.cli import app

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def tried(record_property):
    """Note how many cases of an input a test has tried, for a row of docs/reliability.md.

    ``benchmarks/reliability.py tests`` reads it: (input, cases, what was found beside "as stated").
    """

    def note(what, cases=1, found=""):
        record_property("tried", json.dumps([what, cases, found]))

    return note
