"""One small run from training to int8 on two runtimes, which the faults are compared with."""

import os
import socket
from functools import partial

import pytest
from attempts import attempt, write_recipe


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The recipe of the run."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def guarded(home):
    """Refuse every connection, and begin with an empty home."""

    def refuse(_, address):
        raise AssertionError(f"a connection to {address}")

    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = lambda *names, **_: (_ for _ in ()).throw(AssertionError(f"asks {names}"))
    os.environ["HOME"] = str(home)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TORCH_HOME"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """A finished run of it; its home, which was empty, lies beside it."""
    place = tmp_path_factory.mktemp("whole")
    (place / "home").mkdir()
    guard = partial(guarded, place / "home")
    ended = attempt("run", small, "--out", place / "run", log=place / "log", fault=guard)
    assert ended.code == 0, ended.told
    return place / "run"
