"""The recipe of a derived image: against goldens, and what its name follows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rendering import HostVariables

GOLDEN = Path(__file__).parent / "golden"
BASE = {"__vllm_image_base_id": "sha256:" + "b" * 64}
PACKAGES = {"vllm_image_derived_wheels": ["transformers==5.3.0", "huggingface-hub==1.7.2"]}


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "transformers-5.3.0-py3-none-any.whl").write_bytes(b"wheel")
    return folder


def host(tmp_path: Path, **overrides: Any) -> HostVariables:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    return HostVariables(folder, **BASE | PACKAGES | overrides)


@pytest.mark.parametrize("source", ["wheels", "index"])
def test_golden(source: str, wheels: Path, tmp_path: Path) -> None:
    given = {"vllm_image_derived_wheels_dir": str(wheels)} if source == "wheels" else {}
    golden = GOLDEN / f"derived-image.{source}.Dockerfile"
    rendered = host(tmp_path, **given).template_file("derived-image.Dockerfile.j2")
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text(), "meant? then: UPDATE_GOLDEN=1 make test-fast"


def test_the_name_follows_what_the_image_is_made_from(wheels: Path, tmp_path: Path) -> None:
    def name(**overrides: Any) -> str:
        return str(host(tmp_path, **overrides).template("{{ __vllm_image_derived_name }}"))

    from_wheels = {"vllm_image_derived_wheels_dir": str(wheels)}
    names = [
        name(),
        name(__vllm_image_base_id="sha256:" + "c" * 64),
        name(vllm_image_derived_wheels=["transformers==5.3.0"]),
        name(**from_wheels),
    ]
    assert name(**from_wheels) == names[-1]
    (wheels / "transformers-5.3.0-py3-none-any.whl").write_bytes(b"another wheel")
    names.append(name(**from_wheels))
    assert len(set(names)) == len(names)
    assert all(name.startswith("localhost/glm-ocr-derived:") for name in names)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"vllm_image_derived_wheels": ["transformers>=5"]}, "found transformers>=5"),
        ({"vllm_image_derived_wheels": ["tokenizers==0.22.2 --hash=sha256:abc"]}, "found tokenizers==0.22.2 --hash"),
        ({"vllm_image_derived_wheels": ["a==1 && reboot"]}, "found a==1 && reboot"),
        ({"vllm_image_derived_wheels_dir": "/absent"}, "found /absent"),
        ({"vllm_image_expected_id": "v0.18.0rc1"}, "found v0.18.0rc1"),
    ],
)
def test_what_cannot_be_derived_is_named(overrides: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    (problem,) = host(tmp_path, **overrides).template("{{ __vllm_image_problems }}")
    assert complaint in problem


def test_the_ready_made_list_is_accepted(tmp_path: Path) -> None:
    """The commented example of the inventory, uncommented."""
    inventory = (Path(__file__).parents[2] / "inventory" / "group_vars" / "ascend910" / "vllm_image.yml").read_text()
    packages = [line.removeprefix("#   - ") for line in inventory.splitlines() if line.startswith("#   - ")]
    assert [package.partition("==")[0] for package in packages] == ["transformers", "huggingface-hub"]
    accepted = host(tmp_path, vllm_image_derived_wheels=packages, vllm_image_expected_id="sha256:" + "a" * 64)
    assert accepted.template("{{ __vllm_image_problems }}") == []
