"""The image: what the probe refuses before the service is touched, images derived on the host, overlays."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from archives import image_archive, load, tar
from lab import LAB_CACHE, Play, chat, container_start
from ledger import ledger
from rendering import PROJECT

OVERLAY = PROJECT / "files" / "overlays" / "rotary_embedding"
#: A file of the engine that nothing reads.
TARGET = "/usr/local/lib/python3.11/dist-packages/vllm/py.typed"


def image_of(node: Host) -> str:
    """The id of the image that serves."""
    return str(node.check_output("docker container inspect --format '{{.Image}}' glm-ocr"))


def in_image(node: Host, image: str, command: str) -> str:
    return str(node.check_output(f"docker run --rm --network=none --entrypoint=sh {image} -c '{command}'"))


@pytest.fixture(scope="module")
def derived_images_removed(node: Host) -> Iterator[None]:
    """Asked for before ``restored``, so that none of them serves any more."""
    yield
    node.run(
        "docker images --quiet --filter reference=localhost/glm-ocr-* | xargs --no-run-if-empty docker rmi --force"
    )


def test_a_typo_in_a_flag_is_refused_in_the_parsers_own_words(service: Host, play: Play, url: str) -> None:
    with ledger(url) as book:
        refused = play("deploy.yml", vllm_service_extra_flags={"max-num-seqz": 32})
    assert (book.lost, book.refused) == ([], 0)
    assert book.complete > 0
    assert refused.rc != 0
    assert "[PROBE_FLAGS]" in refused.failures
    assert "unrecognized arguments: --max-num-seqz 32" in refused.failures


def test_the_probe_refuses_in_check_mode_too(service: Host, play: Play) -> None:
    refused = play("deploy.yml", check=True, vllm_service_extra_flags={"compilation-config": {"cudagraph_modez": 1}})
    assert refused.rc != 0
    assert "cudagraph_modez" in refused.failures


def test_an_empty_driver_folder_is_caught_inside(service: Host, play: Play) -> None:
    driver = "/usr/local/Ascend/driver"
    service.check_output(f"mv {driver}/lib64/driver {driver}/driver.away")
    try:
        refused = play("deploy.yml")
    finally:
        service.check_output(f"mv {driver}/driver.away {driver}/lib64/driver")
    assert refused.rc != 0
    assert "[PROBE_DRIVER]" in refused.failures


def test_clients_that_ask_for_everything_are_a_warning(service: Host, play: Play) -> None:
    told = play("deploy.yml", check=True, glm_ocr_client_max_tokens=8192)
    assert (told.rc, told.changed) == (0, 0), told.failures
    assert "[PROBE_CLIENT_MAX_TOKENS] warning" in told.stdout


def test_an_overlay_over_another_original_is_refused_with_both_hashes(
    service: Host, play: Play, tmp_path: Path
) -> None:
    source = tmp_path / "py.typed"
    source.write_text("# overlay\n")
    overlay = {"source": str(source), "target": TARGET, "original_sha256": "0" * 64}
    refused = play("deploy.yml", vllm_service_overlays=[overlay])
    assert refused.rc != 0
    assert "[PROBE_OVERLAY]" in refused.failures
    assert "0" * 64 in refused.failures
    assert in_image(service, image_of(service), f"sha256sum {TARGET}").split()[0] in refused.failures


OLD = {"transformers": "4.57.6", "huggingface-hub": "0.36.2", "tokenizers": "0.22.2"}
OLD_IMAGE = "localhost/glm-ocr-old:1"


def wheels(folder: Path, packages: dict[str, str]) -> dict[str, object]:
    """What has the hosts derive an image with these packages, their wheels in the folder."""
    names = [f"{name}=={version}" for name, version in packages.items()]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    platform = ["--python-version=3.11", "--platform=manylinux2014_x86_64", f"--find-links={LAB_CACHE / 'wheels'}"]
    subprocess.run([*pip, *platform, f"--dest={folder}", *names], check=True)
    return {"vllm_image_derived_wheels": names, "vllm_image_derived_wheels_dir": str(folder)}


@pytest.mark.long
def test_an_image_with_an_old_transformers_is_refused_and_the_derived_image_passes(
    derived_images_removed: None, restored: None, node: Host, play: Play, url: str, tmp_path: Path
) -> None:
    base, started = image_of(node), container_start(node)
    frozen = in_image(node, base, "pip freeze").splitlines()
    versions = dict(line.replace("_", "-").split("==") for line in frozen if "==" in line)
    new = {name: versions[name] for name in OLD}
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()

    # The old image is made with the same means, and refused before the service is touched.
    with ledger(url) as book:
        refused = play("deploy.yml", **wheels(tmp_path / "old", OLD))
    assert refused.rc != 0
    assert "[PROBE_MODEL_TYPE]" in refused.failures
    assert "glm_ocr" in refused.failures
    assert "transformers 5.1.0 or newer" in refused.failures
    assert "found transformers 4.57.6" in refused.failures
    assert "vllm_image_derived_wheels" in refused.failures
    assert container_start(node) == started
    assert (book.lost, book.refused) == ([], 0)
    assert book.complete > 0

    # With that image as the stock one, the fix as data, and an overlay, the deployment passes and stays.
    (old_image,) = node.check_output("docker images --no-trunc --quiet localhost/glm-ocr-derived").split()
    node.check_output(f"docker tag {old_image} {OLD_IMAGE}")
    source = tmp_path / "py.typed"
    source.write_text("# an overlay of a test\n")
    original = in_image(node, base, f"sha256sum {TARGET}").split()[0]
    given = {
        "glm_ocr_image": OLD_IMAGE,
        **wheels(tmp_path / "new", new),
        "vllm_service_overlays": [{"source": str(source), "target": TARGET, "original_sha256": original}],
    }
    deployed = play("deploy.yml", **given)
    assert deployed.rc == 0, deployed.failures
    derived = image_of(node)
    labels = json.loads(node.check_output(f"docker image inspect --format '{{{{json .Config.Labels}}}}' {derived}"))
    assert labels["glm-ocr.base-id"] == old_image
    assert f"transformers=={new['transformers']}" in labels["glm-ocr.requirements"]
    assert labels["glm-ocr.project-version"]
    assert node.check_output(f"docker exec glm-ocr cat {TARGET}") == "# an overlay of a test"
    assert chat(url, "OK", max_tokens=1).status_code == 200
    started = container_start(node)
    again = play("deploy.yml", **given)
    assert (again.rc, again.changed) == (0, 0), again.failures
    assert container_start(node) == started


def test_the_rotary_overlay_is_right_and_its_original_wrong(service: Host, tmp_path: Path) -> None:
    """In the engine's image, against its own vLLM; no NPU is behind it."""
    target = tmp_path / "vllm_ascend" / "ops" / "rotary_embedding.py"
    target.parent.mkdir(parents=True)
    patched = (OVERLAY / "rotary_embedding.py.patched").read_bytes()
    target.write_bytes(patched)
    subprocess.run(["git", "apply", "--reverse", OVERLAY / "rotary_embedding.patch"], cwd=tmp_path, check=True)
    folder = "/var/tmp/glm-ocr-rotary"
    for name, content in {
        "check_rotary.py": (PROJECT / "tests" / "lab" / "overlay" / "check_rotary.py").read_bytes(),
        "original": target.read_bytes(),
        "patched": patched,
    }.items():
        encoded = base64.b64encode(content).decode()
        service.check_output(f"mkdir -p {folder} && echo {encoded} | base64 --decode > {folder}/{name}")
    container = f"docker run --rm --network=none --volume={folder}:/rotary:ro {image_of(service)}"
    run = f"{container} python3 /rotary/check_rotary.py"
    try:
        right = service.run(f"{run} --original /rotary/original --patched /rotary/patched")
        wrong = service.run(f"{run} --original /rotary/original --patched /rotary/original")
    finally:
        service.check_output(f"rm -r {folder}")
    assert right.rc == 0, right.stdout + right.stderr
    report = json.loads(right.stdout.splitlines()[-1])
    assert report["cases"]["original interleaved 3d"]["max_abs_difference"] > 1
    assert report["cases"]["patched interleaved 3d"]["max_abs_difference"] <= report["tolerance"]
    assert wrong.rc == 1, wrong.stdout + wrong.stderr
    assert hashlib.sha256(target.read_bytes()).hexdigest() in (OVERLAY / "README.md").read_text()


ARCHIVED = "localhost/glm-ocr-archived:1"


@pytest.fixture
def archived(node: Host) -> Iterator[None]:
    yield
    node.run(f"docker rmi --force {ARCHIVED}")


def test_an_altered_archive_is_refused_by_its_id(archived: None, service: Host, play: Play) -> None:
    trusted, altered = (tar({"opt/model.py": code}) for code in (b"answer = 42\n", b"answer = 43\n"))
    # One byte of the layer: Docker itself sees it while it does not have the right layer.
    rc, output = load(service, image_archive(ARCHIVED, altered, recorded=trusted))
    assert rc != 0
    assert "invalid diffID" in output

    assert load(service, image_archive(ARCHIVED, trusted))[0] == 0
    pinned = service.check_output(f"docker image inspect --format '{{{{.Id}}}}' {ARCHIVED}")
    given = {"glm_ocr_image": ARCHIVED, "vllm_image_expected_id": pinned}
    # The one that is meant passes here; it has no engine, which the probe sees.
    passed = play("deploy.yml", **given)
    assert passed.rc != 0
    assert "[IMAGE_ID]" not in passed.failures
    assert "[PROBE_" in passed.failures

    # With a configuration that fits the altered layer Docker takes it, and its id is another.
    assert load(service, image_archive(ARCHIVED, altered))[0] == 0
    loaded = service.check_output(f"docker image inspect --format '{{{{.Id}}}}' {ARCHIVED}")
    assert loaded != pinned
    refused = play("deploy.yml", **given)
    assert refused.rc != 0
    assert "[IMAGE_ID]" in refused.failures
    assert pinned in refused.failures
    assert loaded in refused.failures


def test_an_image_of_another_architecture_is_refused(archived: None, service: Host, play: Play) -> None:
    archive = image_archive(ARCHIVED, tar({"opt/model.py": b"answer = 42\n"}), architecture="arm64")
    assert load(service, archive)[0] == 0
    refused = play("playbooks/preflight.yml", glm_ocr_image=ARCHIVED)
    assert refused.rc != 0
    assert "[IMAGE_ARCHITECTURE]" in refused.failures
    assert "arm64" in refused.failures
