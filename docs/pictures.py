"""Pictures of a report for the README: desktop, dark, phone and paper.

    python docs/pictures.py runs/NAME/report.html docs

Needs chromium and the package playwright.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

LARGEST_KIB = 300  # of a picture
VIEWS = {  # name: width, height, colour scheme, medium
    "desktop": (1280, 1240, "light", "screen"),
    "dark": (1280, 1240, "dark", "screen"),
    "phone": (390, 1180, "light", "screen"),
    "print": (794, 1123, "light", "print"),  # A4 at 96 dots per inch
}


def main(report: Path, out: Path) -> None:
    """Write one picture for each view of ``report`` to ``out``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, (width, height, scheme, medium) in VIEWS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.emulate_media(media=medium, color_scheme=scheme)
            page.goto(report.resolve().as_uri())
            _shoot(page, out / f"report-{name}.png")
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(report.resolve().as_uri())
        for section in ("inside", "lost", "looking"):
            _shoot(page.locator(f"#{section}"), out / f"report-{section}.png")
        browser.close()


def _shoot(view, path: Path) -> None:
    """Take a picture of ``view``; few colours keep it small."""
    view.screenshot(path=path)
    with Image.open(path) as picture:
        shown = picture.convert("RGB").crop((0, 0, picture.width, min(picture.height, 1500)))
        shown.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LARGEST_KIB * 1024:
        raise SystemExit(f"{path} is larger than {LARGEST_KIB} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
