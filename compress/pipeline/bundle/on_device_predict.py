#!/usr/bin/env python3
"""Print what a network of this bundle answers to pictures, prepared as it was trained.

    python3 predict.py PICTURE... [--model NAME] [--runtime auto|...] [--json FILE] [--out DIR]

Needs what run.py needs, and Pillow to read pictures. Prints the same as `compress predict` does
where the bundle was made; --out writes pictures with boxes, classes of pixels or captions on them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import numpy as np
from answers import (  # type: ignore[import-not-found]  # beside it in the bundle
    arrays_told,
    best_boxes,
    boxes_in_picture,
    boxes_told,
    classes_told,
    confident,
    map_in_picture,
    map_told,
    nearest_told,
)
from pictures import as_8_bit, fitted, frames_of, placed  # type: ignore[import-not-found]
from run import (  # type: ignore[import-not-found]
    HERE,
    RUNTIMES,
    DeviceError,
    chosen_runtime,
    detected,
    print_line,
    print_rows,
    read_bundle,
)


def read_picture(path: str, channels: int) -> Any:
    """Return the pixels of a picture, upright, RGB or grey, as a Pillow image of 8 bits."""
    try:
        from PIL import Image
    except ImportError:
        raise DeviceError("reading pictures needs Pillow. Try: pip install pillow") from None
    try:
        with Image.open(path) as image:
            if frames_of(image) > 1:
                raise DeviceError(path + " holds several frames or pages; save one as a file")
            return as_8_bit(image, channels)
    except (OSError, ValueError, SyntaxError) as error:
        raise DeviceError(path + " is not a readable picture: " + str(error)) from None


def fed(pixels: Any, given: dict[str, Any], shape: Any, dtype: str) -> Any:
    """Return pixels (H, W, C) as the input takes them: normalized, or uint8 as they are."""
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    layout = "NCHW" if first else "NHWC" if last else None
    values = pixels[..., ::-1] if given["color"] == "BGR" else pixels
    if dtype == "uint8":
        layout = layout or "NHWC"
    else:
        layout = given.get("layout") or layout or "NCHW"
        mean, std = (np.array(given[key], np.float32) for key in ("mean", "std"))
        values = (values.astype(np.float32) / np.float32(255) - mean) / std
    batch = values[None] if layout == "NHWC" else values.transpose(2, 0, 1)[None]
    return np.ascontiguousarray(batch.astype(dtype))


class Answer:
    """What the outputs for one picture say."""

    def __init__(self, bundle: dict[str, Any], outputs: dict[str, Any], place: Any, shape: Any):
        self.outputs, self.place, self.shape = outputs, place, shape
        self.size = tuple(bundle["input"]["image_size"])  # of the network's input
        self.options, self.labels = bundle["answer"]["options"], bundle["labels"]
        self.rows = getattr(self, "_" + bundle["answer"]["form"].replace(" ", "_"))()

    def _main(self, ndim: int, name: str) -> Any:
        fitting = [key for key, value in self.outputs.items() if value.ndim == ndim]
        if not fitting:
            raise DeviceError("no output has " + str(ndim) + " dimensions")
        found = self.outputs[name if name in fitting else fitting[0]][0]
        if not np.isfinite(found).all():
            raise DeviceError("the outputs are not finite numbers")
        return found

    def _name(self, label: int) -> str:
        return self.labels[label] if 0 <= label < len(self.labels) else str(label)

    def _classes(self) -> Any:
        logits = self._main(2, "logits")
        powers = np.exp(logits.astype(np.float64) - float(logits.max()))
        is_done = (logits >= 0).all() and abs(float(logits.sum()) - 1) < 1e-3  # by a softmax in it
        chances = logits if is_done else powers / powers.sum()
        return [
            {"class": self._name(int(k)), "probability": float(chances[k])}
            for k in np.argsort(-logits, kind="stable")[:5]
        ]

    def _several_classes(self) -> Any:
        logits = self._main(2, "logits").astype(np.float64)
        chances = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        return classes_told(chances, chances > self.options["threshold"], self._name)

    def _class_map(self) -> Any:
        logits = self._main(4, "out")
        rows, columns, last = logits.shape
        classes = len(self.labels) or (last if rows == columns else rows)
        is_last = rows != classes and last == classes
        found = logits.argmax(2 if is_last else 0)
        self.map = map_in_picture(found, self.size, self.place, self.shape)
        return map_told(self.map, self._name)

    def _boxes(self) -> Any:
        least, most = self.options["score_threshold"], self.options["max_boxes"]
        seen = best_boxes(*self._detected(), least, most)
        seen["boxes"] = boxes_in_picture(seen["boxes"], self.place, self.shape)
        return boxes_told(confident(seen), self._name)

    def _detected(self) -> Any:
        """Return boxes, scores and labels, whatever form the outputs have."""
        if {"boxes", "scores", "labels"} <= set(self.outputs):
            found = [self.outputs[name] for name in ("boxes", "scores", "labels")]
            boxes, scores, labels = found if found[0].ndim == 2 else [each[0] for each in found]
            return boxes, scores, labels.astype(np.int64) - int(self.options["background"])
        head = self._main(3, "boxes")
        rows = detected(head, len(self.labels), self.options)
        if rows is None:
            raise DeviceError("boxes of shape " + str(head.shape) + " are not known here")
        return rows

    def _image(self) -> Any:
        image = self._main(4, "image")
        if image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
            image = np.moveaxis(image, 2, 0)
        self.picture = np.clip(image, 0, self.options["peak"]).astype(np.float32)
        return arrays_told({"image": self.picture})

    def _embedding(self) -> Any:
        vector = self._main(2, "embedding").astype(np.float32)
        self.vector = vector / np.maximum(np.linalg.norm(vector), 1e-12)
        return arrays_told({"embedding": self.vector})

    def _outputs(self) -> Any:
        return arrays_told({name: value[0] for name, value in self.outputs.items()})


def drawn(answer: Answer, picture: Any) -> Any:
    """Return the picture with the answer on it."""
    from PIL import Image, ImageDraw

    if hasattr(answer, "picture"):
        pixels = np.round(255 * answer.picture / answer.options["peak"]).astype(np.uint8)
        return Image.fromarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
    picture = picture.convert("RGB")
    if hasattr(answer, "map"):
        hues = (np.arange(answer.map.max() + 1) * 158 % 256).astype(np.uint8)[None]
        bands = [Image.fromarray(np.full_like(hues, 0) + each) for each in (hues, 200, 230)]
        colours = np.asarray(Image.merge("HSV", bands).convert("RGB"))[0]
        mixed = (np.asarray(picture) // 2 + colours[np.maximum(answer.map, 0)] // 2).astype(
            np.uint8
        )
        shown = np.where((answer.map >= 0)[..., None], mixed, np.asarray(picture))
        return Image.fromarray(shown)
    canvas = ImageDraw.Draw(picture)
    for line, row in enumerate(answer.rows):
        text = " ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        place = (2, 1 + 11 * line)
        if "x1" in row:
            place, text = (row["x1"], row["y1"]), row["class"]
            canvas.rectangle((row["x1"], row["y1"], row["x2"], row["y2"]), outline=(255, 0, 0))
        canvas.text(place, text, fill=(255, 0, 0))
    return picture


def answers_of(bundle: dict[str, Any], session: Any, paths: list[str]) -> list[tuple[Answer, Any]]:
    """Return what the network answers to each picture, and the picture."""
    given, found = bundle["input"], []
    size = tuple(given["image_size"])
    for path in paths:
        picture = read_picture(path, given["channels"])
        shape = (picture.height, picture.width)
        place = placed(size, given["resize"], given["crop"], *shape)
        small = fitted(picture, size, given["resize"], place, given["interpolation"])
        pixels = np.array(small, np.uint8).reshape(*size, -1)
        values = fed(pixels, given, session.shape, session.dtype)
        outputs = dict(zip(session.outputs, session.run(values)))  # noqa: B905
        found.append((Answer(bundle, outputs, place, shape), read_picture(path, 3)))
    if len(paths) > 1 and hasattr(found[0][0], "vector"):
        told = nearest_told(np.stack([answer.vector for answer, _ in found]), paths)
        for (answer, _), rows in zip(found, told):  # noqa: B905
            answer.rows = rows
    return found


def network(bundle: dict[str, Any], name: Any, kind: Any) -> Any:
    """Return the network that is asked for; the last one for the runtime if none is."""
    fitting = [m for m in bundle["models"] if m["target"] in (None, *kind.forms[:1])]
    if name is None:
        return fitting[-1]
    found = [m for m in bundle["models"] if m["name"] == name]
    if not found:
        known = ", ".join(m["name"] for m in bundle["models"])
        raise DeviceError("no network " + repr(name) + ". Known: " + known)
    return found[0]


def main() -> int:
    """Read the bundle and the pictures, answer, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--model", help="name of a network; the last one for the runtime if absent")
    parser.add_argument("--runtime", default="auto", choices=["auto", *RUNTIMES])
    parser.add_argument("--json", help="also write the answers to this file")
    parser.add_argument("--out", help="folder for the pictures with the answers on them")
    wanted = parser.parse_args()
    try:
        bundle = read_bundle()
        kind = chosen_runtime(wanted.runtime)
        model = network(bundle, wanted.model, kind)
        session = kind(os.path.join(HERE, model["file"]), 1)
        found = answers_of(bundle, session, wanted.pictures)
    except DeviceError as error:
        sys.stderr.write(str(error) + "\n")
        return 2
    show_answers(
        wanted.pictures, [answer for answer, _ in found], model["name"] + " on " + kind.name
    )
    if wanted.json:
        content = [
            {"image": path, "answer": answer.rows}
            for path, (answer, _) in zip(wanted.pictures, found)  # noqa: B905
        ]
        with open(wanted.json, "w", encoding="utf-8") as file:
            json.dump({"model": model["name"], "images": content}, file, indent=2)
    if wanted.out:
        os.makedirs(wanted.out, exist_ok=True)
        for number, (answer, picture) in enumerate(found):
            stem = os.path.splitext(os.path.basename(wanted.pictures[number]))[0]
            drawn(answer, picture).save(os.path.join(wanted.out, str(number) + "-" + stem + ".png"))
    return 0


def plain_text(value: Any) -> str:
    """Return a text that a terminal shows and does not obey."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def show_answers(paths: list[str], answers: list[Answer], title: str) -> None:
    """Print a line for each thing that is told of each picture."""
    print_line(title)
    columns = list(dict.fromkeys(key for answer in answers for row in answer.rows for key in row))
    lines = [["picture", *(columns or ["answer"])]]
    for path, answer in zip(paths, answers):  # noqa: B905
        for row in answer.rows:
            cells = [row.get(key, "") for key in columns]
            lines.append(
                [path] + [f"{c:.4f}" if isinstance(c, float) else plain_text(c) for c in cells]
            )
        if not answer.rows:
            lines.append([path, "nothing found", *[""] * (len(columns) - 1)])
    print_rows(lines)


if __name__ == "__main__":
    sys.exit(main())
