"""No network and nothing written outside the run folder and the cache, over whole runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import files

WRITES = re.compile(r'"((?:[^"\\]|\\.)*)"[^"]*(?:O_WRONLY|O_RDWR|O_CREAT)')
MAKES = re.compile(r'\b(?:mkdir|mkdirat|rename|renameat2?|link|symlink|unlink)\w*\(.*?"([^"]+)"')
FAMILY = re.compile(r"socket\((AF_\w+)|connect\(\d+, \{sa_family=(AF_\w+)")
HARMLESS = ("/dev/", "/proc/", "/sys/fs/cgroup")


@pytest.mark.slow
def test_a_run_opens_no_connection_and_leaves_home_clean(whole, tried):
    """The run that all others are compared with could reach nothing, and began without a home."""
    tried("a whole run with every connection refused: none is tried, HOME holds the cache alone")
    home = whole.parent / "home"
    assert {name for name in files(home) if not name.startswith(".cache/compress/")} == set()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
def test_no_system_call_reaches_elsewhere(small, tmp_path, tried):
    """Every process of a run, its children included, seen from the kernel."""
    tried("a whole run under strace: no connection, no file opened to write outside")
    home, run, temporary, here = (tmp_path / name for name in ("home", "run", "tmp", "here"))
    for folder in (home, temporary, here):
        folder.mkdir()
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-s", "300", "-o", trace]
    command += ["-e", "trace=network,open,openat,openat2,creat,mkdir,mkdirat,rename,renameat2"]
    command += ["-e", "signal=none", sys.executable, "-m", "compress", "run", small, "--out", run]
    keep = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    env = keep | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = str(Path.cwd())
    ended = subprocess.run(
        list(map(str, command)), cwd=here, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    allowed = [str(run), str(home / ".cache" / "compress"), str(temporary), *HARMLESS]
    families, written = set(), set()
    for line in trace.read_text(errors="replace").splitlines():
        if "= -1" in line:
            continue
        families.update(name for pair in FAMILY.findall(line) for name in pair if name)
        found = WRITES.search(line) if "open" in line or "creat" in line else MAKES.search(line)
        if found:
            written.add(found[1])
    assert families <= {"AF_UNIX", "AF_NETLINK"}, families
    outside = {
        name for name in written if Path(name).is_absolute() and not name.startswith(tuple(allowed))
    }
    assert outside <= {str(home / ".cache")}, outside  # made to hold the cache
    assert files(here) == set() == files(temporary)
    assert {name for name in files(home) if not name.startswith(".cache/compress/")} == set()
