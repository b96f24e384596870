"""Optional packages are asked for by name, and their absence says what to install."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from compress import packages
from compress.errors import MissingPackageError


def test_an_installed_package_is_imported():
    assert packages.require("json", extra="x", purpose="a test").__name__ == "json"


def test_an_absent_package_gives_the_install_line():
    with pytest.raises(MissingPackageError) as caught:
        packages.require("absent_package", extra="openvino", purpose="runtime 'openvino'")
    assert str(caught.value) == (
        "runtime 'openvino' needs the package 'absent_package', which is not installed. "
        "Install it with: pip install 'compress-cnn[openvino]'."
    )


def test_every_extra_that_a_message_names_exists():
    """``require(extra=...)``, ``install_command(...)`` and doctor's table against pyproject."""
    from compress.cli.doctor import OPTIONAL

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["name"] == packages.DISTRIBUTION
    named = {extra for extra, _ in OPTIONAL.values()}
    for file in Path("compress").rglob("*.py"):
        source = file.read_text()
        named |= set(re.findall(r'require\([^)]*extra="([\w-]*)"', source))
        named |= set(re.findall(r"install_command\([\"\']([\w-]*)[\"\']\)", source))
    assert {"timm", "openvino", "explain"} <= named
    assert named - {""} <= set(project["optional-dependencies"])


def locked_versions(text):
    """Return (name, version) of every package of a lock file that has a hash."""
    blocks = re.findall(r"^([\w.-]+)==(\S+).*((?:\n    --hash=\S+.*)+)", text, re.M)
    return [(canonicalize_name(name), Version(version)) for name, version, _ in blocks]


def test_the_lock_file_holds_every_dependency_with_hashes():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["openvino"], *extras["tensorrt-rtx"]]
    text = Path("requirements.lock").read_text()
    locked = locked_versions(text)
    assert len(locked) == len(re.findall(r"^[\w.-]+==", text, re.M)) > len(wanted)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        versions = [version for each, version in locked if each == name]
        assert versions and all(each in requirement.specifier for each in versions), requirement
    assert not locked_versions("numpy==2.0 ; python_version < '4'\n    # via x\n")


def test_a_package_of_every_installation_is_asked_for_without_an_extra():
    assert packages.install_command() == "pip install compress-cnn"
    with pytest.raises(MissingPackageError, match="Install it with: pip install compress-cnn"):
        packages.require("absent_package", extra="", purpose="a test")


def test_a_dotted_name_below_an_absent_package_is_absent():
    assert not packages.is_installed("absent_package.part")
    assert packages.version("absent-package") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_reports_nothing_over_the_network(monkeypatch):
    pytest.importorskip("mlflow", reason="no mlflow: pip install 'compress-cnn[tracking]'")
    from mlflow.telemetry import utils

    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(utils, "_IS_IN_CI_ENV_OR_TESTING", False)
    monkeypatch.setattr(utils, "_IS_MLFLOW_TESTING_TELEMETRY", False, raising=False)
    packages.require("mlflow", extra="tracking", purpose="a test")
    assert utils.is_telemetry_disabled()


QUIET = """
import sys, pathlib, socket
from compress.packages import require
socket.getaddrinfo = lambda *_, **__: print("a name was asked for")
socket.socket.connect = lambda *_: print("a connection was tried")
import os
before = dict(os.environ)
require(sys.argv[1], extra="", purpose="a test")
print(before == dict(os.environ))
"""


@pytest.mark.parametrize("module", packages.SILENT_IMPORTS)
def test_an_import_reports_nothing_and_leaves_nothing(module, tmp_path):
    """Importing OpenVINO alone writes an identity into the home folder and sends it.

    Ultralytics asks if there is a network, and sets the threads of every later process to one.
    """
    if not packages.is_installed(module):
        pytest.skip(f"no {module}")
    unset = {"CI", "NNCF_CI", "YOLO_OFFLINE", "YOLO_CONFIG_DIR", "OMP_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", QUIET, module], env=env, capture_output=True, text=True
    )
    *told, is_as_found = ended.stdout.splitlines()
    assert is_as_found == "True", ended.stderr
    assert [line for line in told if "a name was" in line or "a connection was" in line] == []
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
