"""One small run from training to int8 on two runtimes, which the faults are compared with."""

import pytest
from attempts import attempt, write_recipe


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The recipe of the run."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """A finished run of it."""
    place = tmp_path_factory.mktemp("whole")
    ended = attempt("run", small, "--out", place / "run", log=place / "log")
    assert ended.code == 0, ended.told
    return place / "run"
