"""WebDataset shards."""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import progress
from compress.data import Source
from compress.data._images import SPLITS, LabelledImages, ShardImages, Subset, files_below
from compress.data._pictures import Pictures
from compress.errors import DataError, boundary

TEST_SHARE = 0.1  # of the images, where no shard is named after a test set
REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+]+:")  # http:, s3:, pipe:
RANGE = re.compile(r"(\d+)\.\.(\d+)")
IMAGES = {"jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff"}
LABELS = ("cls", "json")  # the first one counts
LABEL_KEYS = ("label", "cls", "class")  # of a JSON object
PICKLES = {"pyd", "pickle", "pkl", "pth", "pt"}
LARGEST_LABEL_BYTES = 1 << 20
BLOCK = 512  # of a tar file


@dataclass(frozen=True)
class Webdataset(Pictures):
    """WebDataset shards: tar files of NAME.jpg and NAME.cls or NAME.json, read where they lie.

    ROOT is a folder of them, or their paths: with braces, ``data/{train,val}-{000..146}.tar``, and
    several with commas. Shards called val or test are validation and test images, as with image
    folders; where none is, a tenth of the images is held back as the test set. Only place, size and
    class of each image are kept in memory. The order of training is random among
    ``shuffle_buffer`` images.

    Source: Aizman et al., High Performance I/O For Large Scale Deep Learning, 2019,
    https://arxiv.org/abs/2001.01858. No pickles are read, and no URLs of other machines.
    """

    root: str
    shuffle_buffer: int = 10_000

    def load(self) -> Source:
        """Return the images.

        Raises:
            DataError: a shard is missing, damaged or not labelled; there is nothing to train on.
        """
        paths = _shards(self.root)
        shards = read_shards(paths, self.workers)
        classes, shards = _numbered(shards, self.root)
        parts: dict[str, LabelledImages] = {}
        for split in ("train", "validation", "test"):
            chosen = [i for i, path in enumerate(paths) if _split(path) == split]
            if chosen:
                parts[split] = self._images([paths[i] for i in chosen], [shards[i] for i in chosen])
        if "train" not in parts:
            raise DataError("names no shards to train on", where=self.root)
        test = parts.get("test") or parts.get("validation")
        train = parts["train"]
        if test is None:
            train, test = _held_back(train)
        return Source(
            train,
            test,
            classes,
            validation=parts.get("validation") if "test" in parts else None,
        )

    def _images(self, paths: list[Path], shards: list[Shard]) -> ShardImages:
        return ShardImages(
            tuple(paths),
            np.cumsum([0, *(len(shard.labels) for shard in shards)]),
            np.concatenate([shard.places for shard in shards]),
            np.concatenate([shard.sizes for shard in shards]),
            np.concatenate([shard.labels for shard in shards]),
            self.fit,
            self.channels or 3,
            self.workers,
            self.shuffle_buffer,
        )


def expanded(pattern: str) -> Iterator[str]:
    """Yield what a list with commas and braces stands for: ``a,b``, ``{a,b}``, ``{000..146}``.

    Raises:
        ValueError: a brace has no partner.
    """
    for part in _at_commas(pattern):
        start = part.find("{")
        if start < 0:
            yield part
            continue
        end = _partner(part, start)
        inside = part[start + 1 : end]
        numbers = RANGE.fullmatch(inside)
        for choice in _count(*numbers.groups()) if numbers else expanded(inside):
            for rest in expanded(part[end + 1 :]):
                yield part[:start] + choice + rest


def _at_commas(text: str) -> list[str]:
    """Return the parts of ``text`` between commas that stand outside braces."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError("a brace has no partner")
    return parts


def _partner(text: str, start: int) -> int:
    depth = 0
    for position, letter in enumerate(text[start:], start):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return position
    raise ValueError("a brace has no partner")


def _count(first: str, last: str) -> Iterator[str]:
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{len(first)}d}"


def _shards(root: str) -> list[Path]:

    try:
        names = list(dict.fromkeys(expanded(root)))
    except ValueError as error:
        raise DataError(str(error), where=root, expected="data/train-{000..146}.tar") from None
    paths: list[Path] = []
    for name in names:
        if REMOTE.match(name):
            raise DataError(
                "lies on another machine",
                where=name,
                fix="Copy or mount the shards: they are read from where images lie in them",
            )
        path = Path(name.removeprefix("file:"))
        paths += sorted(map(Path, files_below(path, {".tar"}))) if path.is_dir() else [path]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        found = f"{len(missing)} of {len(paths)} shards are not there: {', '.join(missing[:3])}"
        raise DataError(found if missing else "holds no .tar files", where=root)
    return paths


def _split(path: Path) -> str:
    """Return the split that a shard is part of, by its name or by that of its folder."""
    words = [word for word in re.split("[^a-z]+", path.stem.lower()) if word in SPLITS]
    return SPLITS.get(words[0] if words else path.parent.name.lower(), "train")


def _numbered(shards: list[Shard], root: str) -> tuple[tuple[str, ...], list[Shard]]:
    """Return the names of the classes, and the shards with their numbers for labels."""
    by_name = [shard.labels.dtype.kind == "U" for shard in shards]
    if any(by_name) != all(by_name):
        raise DataError("some shards give classes by number, some by name", where=root)
    known = np.unique(np.concatenate([np.unique(shard.labels) for shard in shards]))
    if all(by_name):
        numbered = [replace(s, labels=np.searchsorted(known, s.labels)) for s in shards]
        return tuple(map(str, known)), numbered
    count = int(known[-1]) + 1 if len(known) > 1 else 1
    return tuple(map(str, range(count))), shards


def _held_back(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Return images to train on and to test on: the same ones in every process and every run."""
    order = np.random.default_rng(0).permutation(len(images))
    test, train = np.split(order, [max(1, round(TEST_SHARE * len(order)))])
    return Subset(images, np.sort(train)), Subset(images, np.sort(test))


@dataclass(frozen=True)
class Shard:
    """Where the images of one shard lie, and what they show."""

    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[Any]  # integers, or names of classes


def read_shards(paths: Sequence[Path], threads: int) -> list[Shard]:
    """Read what every image of the shards is; their pixels are passed over."""
    with ThreadPoolExecutor(threads or None) as pool:
        return list(progress.track(pool.map(read_shard, paths), "reading shards", len(paths)))


def read_shard(path: Path) -> Shard:
    """Read what every image of one shard is; see :func:`read_shards`."""
    places, sizes, labels = array("q"), array("q"), []
    for key, members in _samples(path):
        images = [member for ending, member in members.items() if ending in IMAGES]
        label = next((members[ending] for ending in LABELS if ending in members), None)
        if len(images) != 1 or label is None:
            raise DataError(
                f"sample {key!r} holds {', '.join(members)}",
                where=str(path),
                expected="one image (.jpg, .png, ...) and its class (.cls or .json)",
            )
        places.append(images[0].offset_data)
        sizes.append(images[0].size)
        labels.append(_label(path, key, label))
    if not labels:
        raise DataError("holds no images", where=str(path))
    if len({type(label) for label in labels}) > 1:
        raise DataError("gives some classes by number and some by name", where=str(path))
    return Shard(np.array(places), np.array(sizes), np.array(labels))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the key of every sample and its files by ending; files of a sample lie together."""
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in _members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, endings = file.partition(".")
        ending = endings.rpartition(".")[2].lower()
        if not member.isreg() or not stem:
            continue
        if ending in PICKLES:
            raise DataError(
                f"{member.name} may hold code, and no pickle is read",
                where=str(path),
                fix="Write the shards again without such files",
            )
        if folder + slash + stem != key:
            if key is not None:
                yield key, members
            key, members = folder + slash + stem, {}
        members[ending] = member
    if key is not None:
        yield key, members


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar file with their places; their contents are passed over."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would hold them all
                yield member
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            damaged = bool(file.read(BLOCK).strip(b"\0"))
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"is no readable tar file ({error})", where=str(path), expected="a tar, not compressed"
        ) from None
    if damaged:
        raise DataError(f"is damaged at byte {end}", where=str(path), fix="Replace or remove it")


def _label(path: Path, key: str, member: tarfile.TarInfo) -> int | str:
    """Return the class that a .cls or .json file gives: its number, or its name."""
    if member.size > LARGEST_LABEL_BYTES:
        raise DataError(f"{member.name} has {member.size} bytes", where=str(path))
    with path.open("rb") as file:
        file.seek(member.offset_data)
        content = file.read(member.size)
    with boundary(DataError, f"{member.name} is no text", where=str(path)):
        text = content.decode().strip()
        value = json.loads(text) if member.name.lower().endswith(".json") else text
    if isinstance(value, dict):
        value = next((value[name] for name in LABEL_KEYS if name in value), None)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    known = isinstance(value, str) or (isinstance(value, int) and value >= 0)
    if not known or isinstance(value, bool) or value == "":
        raise DataError(
            f"sample {key!r} has the class {value!r}",
            where=str(path),
            expected=f"a number from 0 or a name; in JSON as one of: {', '.join(LABEL_KEYS)}",
        )
    return int(value) if isinstance(value, int) else str(value)
