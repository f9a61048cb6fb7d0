"""What a deployment leaves on the host, and what answers from outside."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import requests
from testinfra.backend.base import CommandResult
from testinfra.host import Host

import ocr_lines
from lab import WEIGHTS, Played, chat
from text_metrics import character_error_rate

SCRIPTS = "/usr/local/lib/glm-ocr/scripts"


def test_the_deployment_validates_with_pass(deployed: Played) -> None:
    # Not `latest`, which any test may have moved.
    (page,) = re.findall(r"Report: +(\S+)/report\.html", deployed.stdout)
    report = json.loads((Path(page) / "report.json").read_text())
    assert report["verdict"] == "PASS"
    assert report["deployment"]["image"]["id"].startswith("sha256:")
    assert report["deployment"]["command"][:2] == ["vllm", "serve"]
    assert report["stages"]["ocr_smoke"]["engine"]["vllm"]
    assert "CPU lab engine" in report["deployment"]["accelerator"]


def test_unit_and_environment_are_the_hosts(service: Host) -> None:
    unit = service.service("glm-ocr")
    assert unit.is_running
    assert unit.is_enabled
    environment = service.file("/etc/glm-ocr/glm-ocr.env")
    assert (environment.user, environment.mode) == ("root", 0o640)
    assert service.file("/etc/systemd/system/glm-ocr.service").mode == 0o644
    assert service.socket("tcp://0.0.0.0:8000").is_listening


def test_the_engine_got_flags_and_environment_verbatim(service: Host) -> None:
    container = json.loads(service.check_output("docker container inspect glm-ocr"))[0]
    command = container["Config"]["Cmd"]
    assert command[command.index("--compilation-config") + 1] == '{"cudagraph_mode":"FULL_DECODE_ONLY"}'
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True" in container["Config"]["Env"]
    assert {"/dev/davinci0", "/dev/davinci1"} <= {d["PathOnHost"] for d in container["HostConfig"]["Devices"]}
    assert container["HostConfig"]["Init"] is True


def test_models_answers_from_outside_the_node(service: Host, url: str) -> None:
    (model,) = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("glm-ocr", 8192)


def test_the_seeds_chat_request_answers(service: Host, url: str) -> None:
    response = chat(url, "请用一句话介绍 GLM-OCR 模型。")
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("font", sorted(ocr_lines.FONTS))
def test_an_image_is_read(font: str, service: Host, url: str) -> None:
    rng = random.Random(font)
    truths = [ocr_lines.readable_text(rng) for _ in range(10)]
    readings = []
    for truth in truths:
        image = {"type": "image_url", "image_url": {"url": ocr_lines.data_url(ocr_lines.render(truth, font))}}
        response = chat(url, [image, {"type": "text", "text": "Text Recognition:"}])
        readings.append(response.json()["choices"][0]["message"]["content"])
    rate = character_error_rate(truths, readings)
    assert rate is not None
    assert rate <= 0.02, list(zip(truths, readings, strict=True))


def in_the_image(node: Host, command: str) -> CommandResult:
    """A command in an empty folder of a container of the serving image, as somebody there would type it."""
    image = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    return node.run(
        f"docker run --rm --network host --entrypoint bash --volume {SCRIPTS}:{SCRIPTS}:ro"
        f" --volume {WEIGHTS}:{WEIGHTS}:ro {image} -c {shlex.quote(f'cd $(mktemp -d) && {command}')}"
    )


@pytest.mark.parametrize(("arguments", "expected"), [("", None), ("--image test.png", "HELLO 42")])
@pytest.mark.parametrize(
    "mode",
    [
        f"--mode local --model {WEIGHTS}",
        "--mode api --url http://localhost:8000/v1/chat/completions --model-name glm-ocr",
    ],
)
def test_inference_as_the_seed_types_it(mode: str, arguments: str, expected: str | None, service: Host) -> None:
    draw = "import ocr_lines as l; l.render('HELLO 42', 'dejavu-sans-mono').save('test.png')"
    answer = in_the_image(
        service,
        f'PYTHONPATH={SCRIPTS} python -c "{draw}" && ln -s {SCRIPTS}/inference.py'
        f' && python inference.py {mode} {arguments} --prompt "Text Recognition:"',
    ).stdout.strip()
    assert answer == expected if expected else answer


def test_the_benchmark_as_the_seed_types_it(service: Host) -> None:
    done = in_the_image(
        service,
        f"ln -s {SCRIPTS} scripts && python scripts/bench_perf.py --url http://localhost:8000/v1/chat/completions"
        " --model glm-ocr --max-tokens 128 --latency-iters 5 --throughput-requests 10 --throughput-concurrency 2",
    )
    assert done.rc == 0, done.stderr
    figures = r"(?s)Latency mean +\d+\.\d+ ms.*Latency p99 .*Throughput +\d+\.\d+ req/s.*Token throughput +\d+\.\d+ tok"
    assert re.search(figures, done.stdout), done.stdout


def test_the_accuracy_as_the_seed_types_it_needs_an_npu_and_says_so(service: Host) -> None:
    command = (
        f"ln -s {SCRIPTS} scripts && python scripts/eval_accuracy.py --model {WEIGHTS} --output accuracy_result.json"
    )
    done = in_the_image(service, f"{command}; status=$?; cat accuracy_result.json >&2; exit $status")
    assert done.rc == 2
    assert "npu" in done.stdout
    assert json.loads(done.stderr[done.stderr.index("{\n") :])["verdict"] == "ERROR"

    on_the_cpu = in_the_image(service, f"{command} --device cpu --images 2 --scale 1")
    assert on_the_cpu.rc == 0, on_the_cpu.stdout
    for figure in ("max_abs_error", "mean_abs_error", "relative_error", "cosine_similarity", "threshold"):
        assert figure in on_the_cpu.stdout, on_the_cpu.stdout
