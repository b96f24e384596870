"""A table of picture files and their classes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.data import Source
from compress.data._annotated import pictures
from compress.data._images import SPLITS, TEST, LabelledImages, held_out
from compress.data._pictures import Pictures
from compress.errors import DataError, UsageError, absence, boundary, did_you_mean

IMAGE = ("image", "path", "file", "filename", "filepath", "image_path", "img", "name", "id")
LABEL = ("label", "class", "target", "category", "y", "species")
SPLIT = ("split", "set", "subset", "part", "partition")
PARTS = SPLITS | {"dev": "validation"}
Row = dict[str, str]


@dataclass(frozen=True)
class Csv(Pictures):
    """A table, one line for each picture: its file, its class, and if you like its split.

    The first line names the columns. ``image``, ``label`` and ``split`` say which is which; common
    names are recognised ("image", "path", "file"; "label", "class"; "split"). Several columns of
    zeros and ones, ``label: "cat,dog"``, are several classes an image. Files are looked for from
    the table's folder on, from the one beside it that has the first, or from ``folder``. Without a
    split ``test`` of each class is held back, by seed; a validation set without a test set is the
    test set.

    Args:
        image: Column of the files.
        label: Column of the class, or several with commas.
        split: Column of the split.
        folder: Where the files are looked for.
        test: Share of the images that is held back to test on, where none are set apart.
        seed: Of what is held back.
    """

    root: str
    image: str | None = None
    label: str | None = None
    split: str | None = None
    folder: str | None = None
    test: float = TEST
    seed: int = 0

    def load(self) -> Source:
        """Return the pictures of the table.

        Raises:
            DataError: the table is missing, empty or lacks a column, or a file is missing.
        """
        table = Path(self.root)
        rows, columns = _read(table)
        image = _column(self.image, IMAGE, columns, "image", table)
        names = [None] if self.label is None else [each.strip() for each in self.label.split(",")]
        labels = [_column(name, LABEL, columns, "label", table) for name in names]
        split = _column(self.split, SPLIT, columns, "split", table, required=False)
        base = Path(self.folder) if self.folder else _base(table, rows[0][image])
        files = [(base / row[image]).resolve() for row in rows]
        classes, numbers = _numbered(rows, labels, table)
        parts = _parts(rows, split, table)
        train = np.flatnonzero(parts == "train")
        validation, test = np.flatnonzero(parts == "validation"), np.flatnonzero(parts == "test")
        if not len(test):
            test, validation = validation, test
        if not len(test):
            kept, drawn = held_out(numbers[train], self.test, self.seed)
            train, test = train[kept], train[drawn]
        if not len(train):
            raise DataError("has no line of split train", where=str(table))

        def images(chosen: np.ndarray) -> LabelledImages:
            return pictures(self, [files[i] for i in chosen], numbers[chosen])

        return Source(
            images(train),
            images(test),
            classes,
            validation=images(validation) if len(validation) else None,
            target="class" if len(labels) == 1 else "classes",
        )


def _read(table: Path) -> tuple[list[Row], list[str]]:
    if not table.is_file():
        raise DataError(absence(table), where=str(table), expected="a table of files and classes")
    with boundary(DataError, "the table cannot be read", where=str(table)):
        text = table.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0]
    comma = max(",;\t", key=first.count)
    reader = csv.DictReader(text.splitlines(), delimiter=comma, skipinitialspace=True)
    rows: list[Row] = []
    for row in reader:
        if None in row or None in row.values():
            raise DataError(
                "has another number of cells than the first line",
                where=f"{table}, line {reader.line_num}",
            )
        rows.append(row)
    if not rows:
        raise DataError(
            "holds no lines", where=str(table), expected="names of columns, and a line an image"
        )
    return rows, list(reader.fieldnames or ())


def _base(table: Path, first: str) -> Path:
    """Return the folder that names of files begin in: the table's, or one beside it."""
    if (table.parent / first).is_file():
        return table.parent
    beside = [each for each in sorted(table.parent.iterdir()) if (each / first).is_file()]
    return beside[0] if len(beside) == 1 else table.parent


def _column(
    name: str | None,
    usual: Iterable[str],
    columns: Sequence[str],
    what: str,
    table: Path,
    *,
    required: bool = True,
) -> str:
    """Return the name of a column, chosen or recognised; empty where it need not be there."""
    if name is not None:
        if name not in columns:
            raise UsageError(
                f"no column {name!r}{did_you_mean(name, columns)}",
                where=str(table),
                expected=f"one of: {', '.join(columns)}",
            )
        return name
    lower = {column.lower(): column for column in columns}
    found = next((lower[each] for each in usual if each in lower), "")
    if not found and required:
        raise DataError(
            f"which of its columns is the {what} is not clear: {', '.join(columns)}",
            where=str(table),
            fix=f"Say it: data: {{csv: {{root: {table}, {what}: COLUMN}}}}",
        )
    return found


def _numbered(
    rows: Sequence[Row], labels: Sequence[str], table: Path
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes, and each line's class (N,), or zeros and ones (N, K)."""
    if len(labels) == 1:
        values = [row[labels[0]].strip() for row in rows]
        if "" in values:
            line = values.index("") + 2
            raise DataError(f"no {labels[0]}", where=f"{table}, line {line}")
        counted = all(value.lstrip("-").isdigit() for value in values)
        classes = sorted(set(values), key=int if counted else str)
        return tuple(classes), np.array([classes.index(value) for value in values])
    cells = [[row[name].strip() for name in labels] for row in rows]
    for number, given in enumerate(cells):
        if not set(given) <= {"0", "1"}:
            raise DataError(
                f"holds {', '.join(given)}", where=f"{table}, line {number + 2}", expected="0 or 1"
            )
    return tuple(labels), np.array(cells).astype(np.int64)


def _parts(rows: Sequence[Row], split: str, table: Path) -> np.ndarray:
    """Return the split of each line: train where there is no such column."""
    if not split:
        return np.array(["train"] * len(rows))
    given = [row[split].strip().lower() for row in rows]
    unknown = next((each for each in given if each not in PARTS), None)
    if unknown is not None:
        raise DataError(
            f"the split {unknown!r}",
            where=f"{table}, line {given.index(unknown) + 2}",
            expected="train, validation or test",
        )
    return np.array([PARTS[each] for each in given])
