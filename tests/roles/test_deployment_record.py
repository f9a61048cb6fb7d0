"""The deployment record follows the schema, whatever the container engine says."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from deployment import deployment
from rendering import PROJECT

SCHEMA = json.loads((PROJECT / "files" / "schemas" / "report.schema.json").read_text())["$defs"]["deployment"]
IMAGE_ID = "sha256:" + "1" * 64
CONTAINER: dict[str, Any] = {
    "Image": "sha256:" + "0" * 64,
    "State": {"StartedAt": "2026-01-02T03:04:05Z"},
    "Config": {
        "Cmd": ["vllm", "serve", "/w"],
        "Env": ["B=2", "A=1=1", "EMPTY="],
        "Labels": {"glm-ocr.release": "abc"},
    },
    "HostConfig": {"Devices": [{"PathOnHost": "/dev/davinci_manager"}, {"PathOnHost": "/dev/davinci1"}]},
}


def test_what_runs_is_told() -> None:
    record = deployment([CONTAINER], "npu-01", "image:tag", IMAGE_ID, "docker")
    jsonschema.validate(record, SCHEMA)
    assert record["environment"] == {"A": "1=1", "B": "2", "EMPTY": ""}
    assert (record["accelerator"], record["release"]) == ("Ascend NPU /dev/davinci1", "abc")


def test_the_lab_engine_says_that_it_is_no_npu() -> None:
    labels = {"glm-ocr.accelerator": "none (CPU lab engine)"}
    record = deployment([CONTAINER | {"Config": {"Labels": labels}}], "node1", "image:tag", IMAGE_ID, "docker")
    assert record["accelerator"] == "none (CPU lab engine)"


@pytest.mark.parametrize("inspected", [[], [{}], [{"Config": None, "HostConfig": None}]])
def test_what_is_not_known_is_null(inspected: list[dict[str, Any]]) -> None:
    record = deployment(inspected, "npu-01", "image:tag", IMAGE_ID, "podman")
    jsonschema.validate(record, SCHEMA)
    assert record["image"]["id"] is None
    assert record["command"] == []


def test_the_image_that_runs_and_the_one_that_is_named_are_told_apart_whatever_the_engine_writes_before_an_id() -> None:
    assert deployment([CONTAINER], "npu-01", "image:tag", IMAGE_ID, "docker")["image"] == {
        "name": "image:tag",
        "id": "sha256:" + "0" * 64,
        "wanted_id": IMAGE_ID,
    }
    podman = deployment([CONTAINER | {"Image": "0" * 64}], "npu-01", "image:tag", "sha256:" + "0" * 64, "podman")
    assert podman["image"]["id"] == podman["image"]["wanted_id"]
    assert deployment([CONTAINER], "npu-01", "image:tag", "", "docker")["image"]["wanted_id"] is None
