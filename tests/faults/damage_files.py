"""Damage to the files beside the tensors of a checkpoint; every function takes its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

IMAGE_TOKEN = "<|image|>"


def drop_image_token(folder: Path) -> None:
    """The chat template loses the token that images are put in place of.  Raises ``ValueError`` when it has none."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    if IMAGE_TOKEN not in text:
        raise ValueError(f"{path}: expected {IMAGE_TOKEN} in it")
    path.write_text(text.replace(IMAGE_TOKEN, ""), encoding="utf-8")


def normalise_images(folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Images are normalised with another mean and standard deviation, of three channels each."""
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"image_mean": list(mean), "image_std": list(std)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def swap_words(folder: Path, first: str, second: str) -> None:
    """Two entries of the vocabulary change their ids.  Raises ``KeyError`` when one is not there."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
