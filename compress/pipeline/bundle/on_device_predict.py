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
from run import (  # type: ignore[import-not-found]  # beside it in the bundle
    HERE,
    RUNTIMES,
    DeviceError,
    chosen_runtime,
    detected,
    print_line,
    print_rows,
    read_bundle,
)

CONFIDENT = 0.3  # boxes with a lower score are not told
NEAREST = 5
UNSEEN = -1  # in a class map: pixels that the network was not shown


def read_picture(path: str, channels: int) -> Any:
    """Return the pixels of a picture, upright, RGB or grey, as a Pillow image of 8 bits."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DeviceError("reading pictures needs Pillow. Try: pip install pillow") from None
    try:
        with Image.open(path) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise DeviceError(path + " holds several frames or pages; save one as a file")
            upright = ImageOps.exif_transpose(image)
            return _eight_bits(upright, image.format, path).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DeviceError(path + " is not a readable picture: " + str(error)) from None


def _eight_bits(image: Any, kind: Any, path: str) -> Any:
    """Return 16 bits and floats scaled to 8, what is transparent on white, CMYK as on a screen."""
    from PIL import Image

    if image.mode == "CMYK":
        return _on_screen(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if image.mode[:1] not in ("I", "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    is_deep = image.mode.startswith("I;16") or kind in ("PNG", "PPM")
    white = 1.0 if image.mode == "F" else 65535.0 if is_deep else 0.0
    if not white or not np.isfinite(values).all() or values.min() < 0 or values.max() > white:
        raise DeviceError(path + ": which of its numbers is white is not known")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _on_screen(image: Any) -> Any:
    import io

    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    inks, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")


class PictureFit:
    """How a picture of ``height`` x ``width`` pixels lies in the network's input."""

    def __init__(self, given: dict[str, Any], height: int, width: int) -> None:
        self.size = tuple(given["image_size"])
        self.rule, self.filter = given["resize"], given["interpolation"]
        wanted = [round(side / given["crop"]) for side in self.size]
        self.resized = (wanted[0], wanted[1])
        if self.rule != "squash":
            ratios = (wanted[0] / height, wanted[1] / width)
            scale = max(ratios) if self.rule == "short side" else min(ratios)
            sides = [int(scale * side + 1e-6) for side in (height, width)]
            tight = ratios.index(scale)
            sides[tight] = wanted[tight]
            self.resized = (max(1, sides[0]), max(1, sides[1]))
        self.top, self.left = (round((w - h) / 2) for w, h in zip(self.size, self.resized))  # noqa: B905
        self.scale = (self.resized[0] / height, self.resized[1] / width)

    def image(self, picture: Any) -> Any:
        """Return the picture resized, then cropped or padded with grey, (H, W, C) uint8."""
        from PIL import Image

        height, width = self.size
        filters = getattr(Image, "Resampling", Image)
        small = picture.resize(self.resized[::-1], getattr(filters, self.filter.upper()))
        if self.rule == "letterbox":
            grey = 114 if picture.mode == "L" else (114, 114, 114)
            canvas = Image.new(picture.mode, (width, height), grey)
            canvas.paste(small, (self.left, self.top))
        else:
            box = (-self.left, -self.top, width - self.left, height - self.top)
            canvas = small.crop(box)
        return np.array(canvas, np.uint8).reshape(height, width, -1)


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

    def __init__(self, bundle: dict[str, Any], outputs: dict[str, Any], fit: PictureFit, size: Any):
        self.outputs, self.fit, self.size = outputs, fit, size
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

    def _classes(self) -> list[dict[str, Any]]:
        logits = self._main(2, "logits")
        powers = np.exp(logits.astype(np.float64) - float(logits.max()))
        is_done = (logits >= 0).all() and abs(float(logits.sum()) - 1) < 1e-3  # by a softmax in it
        chances = logits if is_done else powers / powers.sum()
        return [
            {"class": self._name(int(k)), "probability": float(chances[k])}
            for k in np.argsort(-logits, kind="stable")[:5]
        ]

    def _several_classes(self) -> list[dict[str, Any]]:
        logits = self._main(2, "logits").astype(np.float64)
        chances = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        present = chances > self.options["threshold"]
        order = np.argsort(-chances, kind="stable")[: max(1, int(present.sum()))]
        return [
            {
                "class": self._name(int(k)),
                "probability": float(chances[k]),
                "present": bool(present[k]),
            }
            for k in order
        ]

    def _class_map(self) -> list[dict[str, Any]]:
        logits = self._main(4, "out")
        rows, columns, last = logits.shape
        classes = len(self.labels) or (last if rows == columns else rows)
        is_last = rows != classes and last == classes
        found = logits.argmax(2 if is_last else 0)
        axes = []
        for axis in (0, 1):
            first = (self.fit.top, self.fit.left)[axis]
            place = np.arange(self.size[axis]) + 0.5
            inside = np.floor(place * self.fit.scale[axis] + first).astype(np.int64)
            side, have = self.fit.size[axis], found.shape[axis]
            at = np.minimum((inside + 0.5) * have / side, have - 1).astype(np.int64)
            axes.append((at, (inside >= 0) & (inside < side)))
        (rows, seen_rows), (columns, seen_columns) = axes
        self.map = np.full(self.size, UNSEEN, np.int32)
        self.map[np.ix_(seen_rows, seen_columns)] = found[
            np.ix_(rows[seen_rows], columns[seen_columns])
        ]
        labels, pixels = np.unique(self.map[self.map != UNSEEN], return_counts=True)
        return [
            {
                "class": self._name(int(labels[k])),
                "pixels_pct": 100 * float(pixels[k] / pixels.sum()),
            }
            for k in np.argsort(-pixels, kind="stable")
        ]

    def _boxes(self) -> list[dict[str, Any]]:
        boxes, scores, labels = self._detected()
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= CONFIDENT][: self.options["max_boxes"]]
        offset = np.array([self.fit.left, self.fit.top] * 2)
        scale = np.array([self.fit.scale[1], self.fit.scale[0]] * 2)
        ends = np.array([self.size[1], self.size[0]] * 2)
        placed = np.clip((boxes[order].astype(np.float32) - offset) / scale, 0, ends)
        return [
            {
                "class": self._name(int(labels[k])),
                "score": float(scores[k]),
                **dict(zip(("x1", "y1", "x2", "y2"), map(float, box))),  # noqa: B905
            }
            for k, box in zip(order, placed)  # noqa: B905
            if (box[2:] > box[:2]).all()
        ]

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

    def _image(self) -> list[dict[str, Any]]:
        image = self._main(4, "image")
        if image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
            image = np.moveaxis(image, 2, 0)
        self.picture = np.clip(image, 0, self.options["peak"]).astype(np.float32)
        return told({"image": self.picture})

    def _embedding(self) -> list[dict[str, Any]]:
        vector = self._main(2, "embedding").astype(np.float32)
        self.vector = vector / np.maximum(np.linalg.norm(vector), 1e-12)
        return told({"embedding": self.vector})

    def _outputs(self) -> list[dict[str, Any]]:
        return told({name: value[0] for name, value in self.outputs.items()})


def told(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Return shape and range of each array."""
    return [
        {
            "output": name,
            "shape": "x".join(map(str, each.shape)) or "a number",
            "lowest": float(each.min()) if each.size else None,
            "mean": float(each.mean()) if each.size else None,
            "highest": float(each.max()) if each.size else None,
        }
        for name, each in arrays.items()
    ]


def tell_nearest(answers: list[Answer], names: list[str]) -> None:
    """Tell of each embedding which of the other pictures are nearest, by cosine."""
    vectors = np.stack([each.vector for each in answers])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    for row, answer in enumerate(answers):
        order = np.argsort(-cosines[row], kind="stable")[: min(NEAREST, len(names) - 1)]
        answer.rows = [{"nearest": names[k], "cosine": float(cosines[row, k])} for k in order]


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
    for path in paths:
        picture = read_picture(path, given["channels"])
        fit = PictureFit(given, picture.height, picture.width)
        values = fed(fit.image(picture), given, session.shape, session.dtype)
        outputs = dict(zip(session.outputs, session.run(values)))  # noqa: B905
        size = (picture.height, picture.width)
        found.append((Answer(bundle, outputs, fit, size), read_picture(path, 3)))
    if len(paths) > 1 and hasattr(found[0][0], "vector"):
        tell_nearest([answer for answer, _ in found], paths)
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
