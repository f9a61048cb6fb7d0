"""Pictures for docs/images of a real run's report, as a browser shows it.

    PYTHONPATH=tests/support python tests/browser/screenshots.py reports/node1/latest docs/images

The first HEIGHT pixels of the page at both widths and in both languages, and the benchmark with its plots at 1280.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from browsing import WIDTHS, chromium, opened

HEIGHT = 1400


def main(report: Path, output: Path) -> int:
    """Writes the pictures; 1 when the page complained of something."""
    output.mkdir(parents=True, exist_ok=True)
    heard: list[str] = []
    with chromium() as browser:
        for language, name in (("en", "report.html"), ("zh", "report.zh.html")):
            for width in WIDTHS:
                with opened(browser, report / name, width) as (page, complaints):
                    page.set_viewport_size({"width": width, "height": HEIGHT})
                    save(page.screenshot(), output / f"report-{language}-{width}.png")
                    if (language, width) == ("en", max(WIDTHS)):
                        save(page.locator("#ocr_bench").screenshot(), output / "report-bench.png")
                    heard += complaints
    print("\n".join(heard or [f"{output}: {len(list(output.glob('*.png')))} pictures"]))
    return 1 if heard else 0


def save(picture: bytes, path: Path) -> None:
    """With a palette: a page has few colours, and a clone carries the pictures."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main(*(Path(argument) for argument in sys.argv[1:])))
