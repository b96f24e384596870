"""The folder of a run, locked: one folder a stage, what is finished, and every file's hash."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress import artifact, progress
from compress.artifact import Artifact
from compress.errors import RunError, absence
from compress.recipe.loading import dump, from_anywhere, to_json
from compress.recipe.settings import Recipe

SCHEMA = 1
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"  # resolved: `compress run` repeats the run from it
OWN_FILES = {RUN_FILE, RECIPE_FILE, "report.html", "report.md", "report.json"}
DONE_FILE = "metrics.json"  # written last: a stage folder that holds it is finished


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. Every file in it is written whole or not at all."""

    root: Path

    @classmethod
    def open(
        cls, root: Path, recipe: Recipe, *, fresh: bool = False, images: str = ""
    ) -> RunFolder:
        """Return the folder of a run of ``recipe``, new or continued.

        Files that a killed run had not finished are removed. The caller holds the folder's lock.

        Args:
            root: Where it is, or will be.
            recipe: What is run. A folder that was begun with another recipe is refused, unless
                they differ only in stages that have left nothing in it yet.
            fresh: Start over: what an earlier run of any recipe left there is removed.
            images: Fingerprint of the data; unknown if empty.

        Raises:
            RunError: the folder belongs to another recipe, holds something that is no run, lacks
                files of finished stages, which may be of other images, or has a name that no
                runtime can be told.
        """
        folder = cls(root)
        folder.check(recipe, fresh=fresh)
        begun = (root / RUN_FILE).is_file()
        if begun and not fresh:
            folder._check_images(images)
        artifact.remove_temporaries(root)
        if begun and fresh:
            folder._clear()
        wanted = to_json(recipe)
        written = root / RECIPE_FILE
        seen = {"images": images} if images else {}
        if begun and not fresh:
            before = folder.description()
            if _completed(before["recipe"]) == wanted and before == before | seen:
                if not written.is_file():  # it was killed between the two
                    artifact.write_text(written, dump(recipe))
                return folder
            description = before | {"recipe": wanted} | seen
        else:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            description = {"created": now, "recipe": wanted, "artifacts": []} | seen
        written.unlink(missing_ok=True)
        folder.write_description(description)
        artifact.write_text(written, dump(recipe))
        return folder

    def check(self, recipe: Recipe, *, fresh: bool = False) -> None:
        """Refuse a folder that ``open`` would refuse; nothing is written.

        Raises:
            RunError: as ``open`` does.
        """
        if not artifact.is_utf8(self.root):
            raise RunError(
                "has a name that is not UTF-8",
                where=str(self.root),
                fix="Give another folder with --out",
            )
        begun = (self.root / RUN_FILE).is_file()
        if not begun and self._holds_something_else():
            raise RunError(
                "the folder is not empty and holds no run",
                where=str(self.root),
                fix="Give another folder with --out",
            )
        if begun and not fresh:
            self._check_recipe(to_json(recipe))
            self._check_files()

    def description(self) -> dict[str, Any]:
        """Return what run.json holds.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        if not (self.root / RUN_FILE).is_file():
            expected = f"a folder with {RUN_FILE}"
            what = "holds no run" if self.root.is_dir() else absence(self.root, "folder")
            raise RunError(what, where=str(self.root), expected=expected)
        return _record(self.root / RUN_FILE, "Start over with --fresh, or give another folder")

    def write_description(self, content: Mapping[str, Any]) -> None:
        """Replace run.json."""
        artifact.write_json(self.root / RUN_FILE, {"schema": SCHEMA} | dict(content))

    def stage(self, number: int, verb: str) -> Path:
        """Return the folder of stage ``number``; it need not exist."""
        return self.root / f"{number:02d}-{verb}"

    def result(self, stage: Path) -> dict[str, Any] | None:
        """Return what a finished stage recorded; None if it is not finished."""
        path = stage / DONE_FILE
        if not path.is_file():
            return None
        return _record(path, "Remove it, and the same command makes that stage again")

    def finish(self, stage: Path, result: Mapping[str, Any], artifacts: Iterable[Artifact]) -> None:
        """Record ``result`` of a stage and its files; from now on it is not run again."""
        description = self.description()
        replaced = [a for a in description["artifacts"] if a["stage"] != stage.name]
        new = [each.to_json() for each in artifacts]
        self.write_description(description | {"artifacts": replaced + new})
        artifact.write_json(stage / DONE_FILE, dict(result))

    def _check_recipe(self, wanted: dict[str, Any]) -> None:
        """Refuse a recipe that changes stages which have left something here already."""
        stored = _completed(self.description().get("recipe", {}))
        changed = sorted(k for k in {*stored, *wanted} if stored.get(k) != wanted.get(k))
        first = _first_changed(stored, wanted, changed) if changed else len(wanted["stages"]) + 2
        begun = [path for path in stage_folders(self.root) if int(path.name[:2]) >= first]
        if any(file.is_file() for path in begun for file in path.rglob("*")):
            raise RunError(
                f"the folder belongs to another recipe; these keys differ: {', '.join(changed)}",
                where=str(self.root),
                fix="Give another folder with --out, or start over with --fresh",
            )

    def _check_images(self, images: str) -> None:
        """Refuse other images than those that finished stages were made with."""
        before = self.description().get("images")
        is_begun = any((stage / DONE_FILE).is_file() for stage in stage_folders(self.root))
        if is_begun and before and images and before != images:
            raise RunError(
                "the images are no longer those that its finished stages were made with",
                where=str(self.root),
                expected=f"images with the fingerprint {before[:16]}; these have {images[:16]}",
                fix="Put them back as they were, give another folder with --out, or start over "
                "with --fresh",
            )

    def _check_files(self) -> None:
        """Refuse a folder in which files of finished stages are missing or changed."""
        for each in self.description()["artifacts"]:
            if not (self.root / each["stage"] / DONE_FILE).is_file():
                continue
            problem = artifact.check_file(self.root, each["path"], each["sha256"])
            if problem is not None:
                raise RunError(
                    f"{problem.problem}, and the run cannot go on",
                    where=str(self.root / problem.path),
                    expected=problem.expected,
                    fix=f"Put it back as it was; or remove the folders from {each['stage']} on, "
                    "and the same command makes them again",
                )

    def _holds_something_else(self) -> bool:
        """Return whether anything is here besides what a run killed before run.json leaves."""
        return self.root.exists() and any(
            path.name != LOCK_FILE and not artifact.is_temporary(path)
            for path in self.root.iterdir()
        )

    def _clear(self) -> None:
        """Remove what a run wrote, and nothing else.

        Killed on the way it leaves a run with its last stages undone: run.json stays until it is
        replaced, and a stage is unfinished before its files go.
        """
        for name in OWN_FILES - {RUN_FILE}:
            (self.root / name).unlink(missing_ok=True)
        for path in reversed(stage_folders(self.root)):
            (path / DONE_FILE).unlink(missing_ok=True)
            shutil.rmtree(path)


def _record(path: Path, fix: str) -> dict[str, Any]:
    """Return what a file of a run holds; ``fix`` says what to do where it is damaged."""
    try:
        content: dict[str, Any] = artifact.read_json(path)
    except RunError as error:
        error.fix = fix
        raise
    return content


def stage_folders(root: Path) -> list[Path]:
    """Return the folders of the stages of a run, in order."""
    return sorted(path for path in root.glob("[0-9][0-9]-*") if path.is_dir())


def recorded_variants(root: Path) -> list[dict[str, Any]]:
    """Return what the finished stages of a run recorded of their networks, the original first."""
    done = [stage / DONE_FILE for stage in stage_folders(root)]
    found = [artifact.read_json(path) for path in done if path.is_file()]
    return [each for content in found if isinstance(content, dict)
            for each in content.get("variants", [])]  # fmt: skip


def default_folder(recipe: Recipe) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, ... that is this recipe's or free."""
    wanted, first = to_json(from_anywhere(recipe)), Path("runs") / (recipe.name or "run")
    for number in itertools.count(1):
        root = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if not root.exists() or (root.is_dir() and not RunFolder(root)._holds_something_else()):
            return root
        if (root / RUN_FILE).is_file():
            with contextlib.suppress(RunError):
                RunFolder(root)._check_recipe(wanted)
                return root
    raise RunError("no free folder", where=str(first))


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe with the defaults of keys that are younger than it."""
    try:
        return to_json(Recipe.model_validate(stored))
    except ValidationError:  # it has keys that are gone: another recipe
        return stored


def _first_changed(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], changed: Sequence[str]
) -> int:
    """Return the number of the first stage folder that depends on one of the ``changed`` keys."""
    before, after = stored.get("stages", []), wanted["stages"]
    has_original = [not stages or "train" not in stages[0] for stages in (before, after)]
    if set(changed) == {"gates"}:
        return len(after) + 2  # no folder depends on them: they judge what was measured
    if set(changed) - {"stages", "targets", "gates", "measure"} or len(set(has_original)) > 1:
        return 0
    alike = 0
    while alike < min(len(before), len(after)) and before[alike] == after[alike]:
        alike += 1
    if "targets" in changed:  # which int8 graphs are written is theirs to say
        verbs = [next(iter(stage)) for stage in after]
        alike = min(alike, verbs.index("quantize") if "quantize" in verbs else alike)
    return alike + has_original[0]


def artifacts_in(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or those of a stage or of a run.

    The folder of a stage that left a torch network stands for that network; one of int8 graphs for
    each of them. A run stands for its last stage that left any.
    """
    if not path.is_dir() or (path / "model.json").is_file():
        return [path]
    graphs = sorted(path.glob("model.onnx")) or sorted(path.glob("model.*.onnx"))
    if graphs:
        return graphs
    for stage in reversed(stage_folders(path)):
        if (found := artifacts_in(stage)) != [stage] or (stage / "model.json").is_file():
            return found
    return [path]


def one_artifact(path: Path) -> Path:
    """Return the one file that a path stands for.

    Raises:
        RunError: it stands for several.
    """
    found = artifacts_in(path)
    if len(found) > 1:
        raise RunError(
            f"holds {len(found)} networks",
            where=str(path),
            expected="one file",
            fix=f"Name it: {', '.join(str(each) for each in found)}",
        )
    return found[0]


def one_graph(path: Path) -> Path:
    """Return the one ONNX file that a path stands for: of a torch network, what lies beside it.

    Raises:
        RunError: it stands for several, or a folder holds none.
    """
    found = one_artifact(path)
    if not found.is_dir():
        return found
    if not (found / "model.onnx").is_file():
        is_network = (found / "model.json").is_file()
        raise RunError(
            "holds no ONNX file",
            where=str(found),
            expected="an ONNX file, or the folder of a stage or a run with one",
            fix=f"Write it: compress export {found} --out net.onnx" if is_network else "",
        )
    return found / "model.onnx"


LOCK_FILE = "run.lock"  # says who works in the folder; one that is left behind locks nothing


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep other processes from running in ``root`` while the block runs; make it if need be.

    **Method:** a POSIX record lock on ``run.lock``. The kernel drops it when the process ends, by
    whatever cause, so there is no stale lock; it does not pass to forked workers, which may outlive
    a killed run, nor to a copy of the folder.

    Raises:
        RunError: another process runs there (the message has its pid), or nothing can be written.
    """
    made = [each for each in (root, *root.parents) if not each.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = _opened(root / LOCK_FILE)
    except OSError as error:
        raise RunError(
            f"cannot be written: {error.strerror or error}",
            where=str(root),
            fix="Check the path and its permissions",
        ) from None
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            (root / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # something is in it
            for folder in made:
                folder.rmdir()


def _opened(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has just ended and removed it


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        progress.warn(f"{path.parent}: this system has no file locks; run here once at a time")
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        raise RunError(
            f"another run works in this folder: pid {holder or 'unknown'}",
            where=str(path.parent),
            fix="Wait until it ends, stop it, or give another folder with --out",
        ) from None
    except OSError as error:  # a network file system without locks
        progress.warn(f"{path.parent}: cannot be locked ({error.strerror}); run once at a time")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
