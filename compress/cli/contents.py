"""What lies in a folder: images, weight files and networks, found by names, nothing imported."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from compress import progress

WEIGHTS = (".safetensors", ".pt", ".pth", ".th")
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
COCO = ("annotations/instances_train*.json", "annotations/train*.json", "train/*.coco.json")
FEWEST = 8  # pictures in a folder that make it one to quantize on


def data_in(folder: Path) -> Iterator[str]:
    """Yield references to the data that lies in ``folder`` or up to two folders below.

    Pictures without labels come last.
    """
    for root in _folders(folder):
        names = {path.name for path in root.iterdir()}
        train, judged = root / "train", {"val", "validation", "valid", "test"} & names
        annotated = next((file for each in COCO for file in sorted(root.glob(each))), None)
        if _masked(root):
            yield f"masks:{root}"
        elif {"Annotations", "JPEGImages"} <= names:
            yield f"voc:{root}"
        elif "data.yaml" in names:
            yield f"yolo:{root / 'data.yaml'}"
        elif annotated is not None:
            yield _coco(annotated, root)
        elif (train.is_dir() and judged and _classes(train, nested=True)) or _classes(root):
            yield f"imagefolder:{root}"
        for ending, kind in ((".npz", "npz"), (".csv", "csv")):
            yield from (f"{kind}:{path}" for path in sorted(root.glob(f"*{ending}")))
    for root in _folders(folder):
        if sum(path.suffix.lower() in PICTURES for path in root.iterdir()) >= FEWEST:
            yield f"images:{root}"


def _masked(root: Path) -> bool:
    """Return whether pictures lie beside folders of masks, here or in a part for training."""
    from compress.data.masks import MASKS

    for place in (root, root / "train", root / "training"):
        found = _names(place)
        if "images" in found and any(_holds_pictures(place / n) for n in found & {*MASKS}):
            return True
    return False


def _holds_pictures(folder: Path, pattern: str = "**/*") -> bool:
    return any(path.suffix.lower() in PICTURES for path in folder.glob(pattern))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _coco(train: Path, root: Path) -> str:
    """Return the reference to an annotation file, and to that of the images to judge on."""
    inside = str(train.relative_to(root))
    others = (root / inside.replace("train", other) for other in ("val", "valid", "test"))
    judged = next((file for file in others if file.is_file()), None)
    return f"coco:root={train}" + (f",test={judged}" if judged else "")


def _folders(folder: Path) -> Iterator[Path]:
    """Yield ``folder`` and those up to two levels below it, without hidden ones and runs."""
    level = [folder]
    for _ in range(3):
        yield from level
        below = [path for each in level for path in sorted(each.iterdir()) if path.is_dir()]
        level = [path for path in below if path.name[0] not in "._" and _is_open(path)]


def _is_open(folder: Path) -> bool:
    """Return whether a folder is to be searched: it is no run, and its permissions allow it."""
    try:
        next(folder.iterdir(), None)
        return not (folder / "run.json").is_file()
    except PermissionError:
        _tell_once(f"{folder} is left out: its permissions do not allow to read it")
        return False


@functools.cache
def _tell_once(line: str) -> None:
    progress.warn(line)  # a folder is searched for data, and again for weights


def _classes(folder: Path, nested: bool = False) -> bool:
    """Return whether at least two folders below hold pictures; ``nested``: at any depth."""
    below = (path for path in folder.iterdir() if path.is_dir())
    return sum(_holds_pictures(path, "**/*" if nested else "*") for path in below) > 1


def files_in(folder: Path, *endings: str) -> list[str]:
    """Return files right in ``folder`` with one of ``endings``, the newest first."""
    found = [path for path in folder.iterdir() if path.suffix in endings]
    return [str(path) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def weights_in(folder: Path) -> Iterator[str]:
    """Yield weight files in ``folder``, then those up to two folders below, the newest first."""
    for root in _folders(folder):
        yield from files_in(root, *WEIGHTS)


def networks_in(folder: Path) -> Iterator[str]:
    """Yield FILE.py:NAME of each class and function that may give a network, nothing imported."""
    for file in files_in(folder, ".py"):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            body = ast.parse(Path(file).read_text(encoding="utf-8")).body
            functions = [node.name for node in body if _returns(node)]
            classes = [
                node.name
                for node in body
                if isinstance(node, ast.ClassDef)
                and any("Module" in ast.unparse(base) for base in node.bases)
            ]
            # parts of a network are defined before the whole
            yield from (f"{file}:{name}" for name in (*functions, *reversed(classes)))


def _returns(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(each, ast.Return) and each.value is not None for each in ast.walk(node)
    )
