"""Pages from a folder in the form of OmniDocBench (``OmniDocBench.json`` beside ``images/``), supplied by the user.

Each annotated region is cut out and read by itself with the prompt of its kind: what is measured is recognition on
the true layout, the second stage of the model's official pipeline.  It is not the benchmark's end-to-end score.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ocr_pages import Page

ANNOTATIONS = "OmniDocBench.json"
IMAGES = "images"
MARGIN_PX = 4
# category_type: kind, and the member that holds the truth.
CATEGORIES = {
    **dict.fromkeys(
        ("title", "text_block", "reference", "figure_caption", "figure_footnote", "table_caption", "table_footnote"),
        ("document", "text"),
    ),
    "table": ("table", "html"),
    "equation_isolated": ("formula", "latex"),
    "code_txt": ("code", "text"),
}


class UnusableError(Exception):
    """A folder that is not in OmniDocBench's form: what was found, and what to do about it."""

    fix = f"Pass the folder that holds {ANNOTATIONS} (of version 1.0 or later) and {IMAGES}/."


def pages(folder: Path, kinds: Sequence[str], count: int, rng: random.Random) -> Iterator[Callable[[], Page]]:
    """What cuts out at most ``count`` regions of each kind, drawn by ``rng``.  Raises ``UnusableError``."""
    try:
        annotated = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
        regions = [region for page in annotated for region in usable(page)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnusableError(f"{folder / ANNOTATIONS}: {error!r}") from error
    for kind in kinds:
        of_kind = [region for region in regions if region[0] == kind]
        for index, region in enumerate(rng.sample(of_kind, min(count, len(of_kind)))):
            if not (image := folder / IMAGES / region[2]).is_file():
                raise UnusableError(f"{image} is missing")
            yield partial(cut_out, f"{kind}-{index:03d}", kind, region[1], image, region[3])


def usable(page: dict[str, Any]) -> list[tuple[str, str, str, list[float]]]:
    """Kind, truth, image file and corners of each region with a truth that the benchmark does not ignore."""
    name = str(page["page_info"]["image_path"])
    regions = []
    for region in page["layout_dets"]:
        kind, member = CATEGORIES.get(region["category_type"], ("", ""))
        if kind and not region.get("ignore") and (truth := region.get(member)):
            regions.append((kind, str(truth), name, [float(corner) for corner in region["poly"]]))
    return regions


def cut_out(identity: str, kind: str, truth: str, path: Path, corners: list[float]) -> Page:
    """The region inside ``corners`` (x and y in turn) with a small margin.  Raises ``OSError``."""
    with Image.open(path) as whole:
        box = (
            max(0, int(min(corners[0::2])) - MARGIN_PX),
            max(0, int(min(corners[1::2])) - MARGIN_PX),
            min(whole.width, int(max(corners[0::2])) + MARGIN_PX),
            min(whole.height, int(max(corners[1::2])) + MARGIN_PX),
        )
        return Page(identity, kind, truth, whole.crop(box).convert("RGB"), {"page": path.name})
