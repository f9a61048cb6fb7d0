"""The shipped overlays: each is its original and its patch, and the example in the inventory names that original.

What an overlay computes is checked where torch and vLLM are: tests/lab/overlay/check_rotary.py.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import yaml

from rendering import PROJECT

OVERLAYS = PROJECT / "files" / "overlays"
INVENTORY = PROJECT / "inventory" / "group_vars" / "ascend910" / "vllm_service.yml"


def example() -> dict[str, str]:
    """The commented example of the inventory, uncommented."""
    text = INVENTORY.read_text().partition("# vllm_service_overlays:\n")[2]
    ((overlay),) = yaml.safe_load("\n".join(line.removeprefix("#") for line in text.splitlines()))
    return dict(overlay)


def original_of(folder: Path, tmp_path: Path) -> bytes:
    target = tmp_path / "vllm_ascend" / "ops" / "rotary_embedding.py"
    target.parent.mkdir(parents=True)
    shutil.copyfile(folder / "rotary_embedding.py.patched", target)
    patch = folder / "rotary_embedding.patch"
    subprocess.run(["git", "apply", "--reverse", str(patch)], cwd=tmp_path, check=True)
    return target.read_bytes()


def test_the_rotary_overlay_is_the_patched_original_of_the_example(tmp_path: Path) -> None:
    overlay = example()
    original = original_of(OVERLAYS / "rotary_embedding", tmp_path)
    assert hashlib.sha256(original).hexdigest() == overlay["original_sha256"]
    assert overlay["original_sha256"] in (OVERLAYS / "rotary_embedding" / "README.md").read_text()
    assert overlay["source"].endswith("/files/overlays/rotary_embedding/rotary_embedding.py.patched")
    assert overlay["target"].endswith("/vllm_ascend/ops/rotary_embedding.py")


def test_the_rotary_overlay_changes_one_condition() -> None:
    patch = (OVERLAYS / "rotary_embedding" / "rotary_embedding.patch").read_text().splitlines()
    removed = [line for line in patch if line.startswith("-") and not line.startswith("---")]
    code = [line for line in patch if line.startswith("+") and not line.startswith(("+++", "+        #"))]
    assert removed == ["-        if self.mrope_section != [16, 24, 24]:"]
    assert code == ["+        if self.mrope_section != [16, 24, 24] or not self.is_neox_style:"]
