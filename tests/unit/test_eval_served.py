"""eval_served.py against the stand-in service and a stand-in model: the healthy pair passes, every fault is caught.

Both sides know one distribution per position, over the ids 1 to 4; the noise of service and floor is the same size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import eval_served
from eval_served import Served
from fake_service import Service

SCHEMAS = Path(__file__).resolve().parents[2] / "files" / "schemas"
PROMPT_IDS = [7, 8, 9]
REPLY_IDS = [1, 1]
TRUTH = {1: 0.90, 2: 0.06, 3: 0.03, 4: 0.01}
SERVED = {1: 0.91, 2: 0.05, 3: 0.03, 4: 0.01}
FLOOR = {1: 0.89, 2: 0.07, 3: 0.03, 4: 0.01}
SWAPPED = {2: 0.90, 1: 0.06, 3: 0.03, 4: 0.01}


def logs(probabilities: Mapping[int, float]) -> dict[int, float]:
    return {token: math.log(value) for token, value in probabilities.items()}


def completion(
    probabilities: Mapping[int, float] = SERVED,
    prompt_ids: Sequence[int] = PROMPT_IDS,
    reply_ids: Sequence[int] = REPLY_IDS,
) -> dict[str, Any]:
    """A reply as vLLM writes it, the same distribution at every position."""
    row = logs(probabilities)
    top = [{"token": f"token_id:{token}", "logprob": value} for token, value in row.items()]
    return {
        "prompt_token_ids": list(prompt_ids),
        "prompt_logprobs": [
            None,
            *(
                {str(t): {"logprob": v, "rank": 1, "decoded_token": "x"} for t, v in row.items()}
                for _ in prompt_ids[1:]
            ),
        ],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "text"},
                "finish_reason": "stop",
                "token_ids": list(reply_ids),
                "logprobs": {"content": [{**top[0], "top_logprobs": top} for _ in reply_ids]},
            }
        ],
    }


class Ids:
    """As much of a tensor as is used."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __getitem__(self, _batch: int) -> Ids:
        return self

    def tolist(self) -> list[int]:
        return self.ids


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, service: Service) -> Service:
    """A model that says TRUTH in fp32 and FLOOR in bf16, and a healthy service."""

    def distributions(
        _config: object, dtype: str, inputs: Sequence[Mapping[str, Any]], served: Sequence[Served]
    ) -> list[list[dict[int, float]]]:
        row = logs(TRUTH if dtype == "float32" else FLOOR)
        pairs = zip(inputs, served, strict=True)
        return [[row] * (len(tensors["input_ids"].ids) - 1 + len(reply.reply_ids)) for tensors, reply in pairs]

    monkeypatch.setattr(
        eval_served, "local_prompts", lambda _config, cases: [{"input_ids": Ids(PROMPT_IDS)} for _ in cases]
    )
    monkeypatch.setattr(eval_served, "local_distributions", distributions)
    service.override["image"] = service.override["text"] = (200, json.dumps(completion()))
    return service


def measured(url: str, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a run from the command line."""
    output = folder / "reports" / "served.json"
    arguments = ["--model", str(folder), "--base-url", url, "--output", str(output), "--scale", "1"]
    status = eval_served.main([*arguments, *more])
    report: dict[str, Any] = json.loads(output.read_text())
    for name in ("stage", "accuracy"):
        jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.schema.json").read_text())).validate(report)
    return status, report


def failed(report: dict[str, Any]) -> set[str]:
    return {entry["id"] for entry in report["checks"] if entry["verdict"] == "FAIL"}


def found(report: dict[str, Any], identity: str) -> str:
    text: str = next(entry["found"] for entry in report["checks"] if entry["id"] == identity)
    return text


def test_healthy_service_passes(local: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = measured(local.url + "/", tmp_path)
    assert (status, report["verdict"]) == (0, "PASS")
    assert [entry["id"] for entry in report["checks"]] == [
        "service",
        "prompt_tokens",
        "top_k",
        "top1",
        "greedy",
        "kl_image",
        "kl_text",
    ]
    assert not any("fix" in entry or "warning" in entry for entry in report["checks"])
    assert len(report["samples"]) == 8
    assert {sample["first_divergence"] for sample in report["samples"]} == {None}
    # Two positions of the prompt and two of the reply, for each of four prompts of a kind.
    assert report["positions"]["image"]["served"]["positions"] == 16
    assert report["positions"]["all"]["served"]["positions"] == 32
    assert report["positions"]["all"]["reply_positions"] == 16
    assert capsys.readouterr().out.splitlines()[-1] == "served_accuracy: PASS (7/7 checks)"


def test_requests_ask_for_ids_and_probabilities(local: Service, tmp_path: Path) -> None:
    measured(local.url, tmp_path, "--top-k", "5", "--images", "2")
    assert len(local.requests) == 6
    for request in local.requests:
        assert request["temperature"] == 0
        assert (request["logprobs"], request["top_logprobs"], request["prompt_logprobs"]) == (True, 5, 5)
        assert request["return_token_ids"]
        assert request["return_tokens_as_token_ids"]
    pictures = {request["messages"][0]["content"][0]["image_url"]["url"] for request in local.requests[:2]}
    assert len(pictures) == 2


def serve(service: Service, kind: str, reply: dict[str, Any]) -> None:
    service.override[kind] = (200, json.dumps(reply))


def test_another_first_token_on_images_only_is_caught(local: Service, tmp_path: Path) -> None:
    serve(local, "image", completion(SWAPPED, reply_ids=[2, 2]))
    status, report = measured(local.url, tmp_path)
    assert status == 1
    assert failed(report) == {"top1", "greedy", "kl_image"}
    assert found(report, "greedy").startswith("4 of 8 equal; image-1 differs from token 0 by 2.71 nats")
    assert {sample["first_divergence"] for sample in report["samples"]} == {0, None}
    assert report["samples"][0]["divergence_gap"] == pytest.approx(math.log(0.9 / 0.06))


def test_a_token_outside_the_other_sides_top_k_is_caught(local: Service, tmp_path: Path) -> None:
    serve(local, "text", completion({4: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, reply_ids=[4, 4]))
    assert "top_k" not in failed(measured(local.url, tmp_path, "--top-k", "4")[1])
    assert "top_k" in failed(measured(local.url, tmp_path, "--top-k", "3")[1])


def test_noise_alone_is_caught_with_the_same_tokens(local: Service, tmp_path: Path) -> None:
    serve(local, "text", completion({1: 0.93, 2: 0.03, 3: 0.03, 4: 0.01}))
    status, report = measured(local.url, tmp_path)
    assert (status, failed(report)) == (1, {"kl_text"})


def test_noise_between_the_limits_warns(local: Service, tmp_path: Path) -> None:
    serve(local, "text", completion({1: 0.916, 2: 0.044, 3: 0.03, 4: 0.01}))
    status, report = measured(local.url, tmp_path)
    assert status == 0
    assert [entry["id"] for entry in report["checks"] if "warning" in entry] == ["kl_text"]


def test_another_prompt_is_caught_and_replies_are_still_compared(local: Service, tmp_path: Path) -> None:
    serve(local, "image", completion(prompt_ids=[7, 8, 8, 9]))
    status, report = measured(local.url, tmp_path)
    assert (status, failed(report)) == (1, {"prompt_tokens"})
    assert "image-1: 4 served, 3 by the weights' own processor" in found(report, "prompt_tokens")
    assert report["positions"]["image"]["served"]["positions"] == 8  # the replies' only


def test_other_ids_of_the_same_number_are_caught(local: Service, tmp_path: Path) -> None:
    serve(local, "text", completion(prompt_ids=[7, 8, 8]))
    assert failed(measured(local.url, tmp_path)[1]) == {"prompt_tokens"}


def test_a_few_replies_may_leave_the_reference_with_a_warning(local: Service, tmp_path: Path) -> None:
    serve(local, "image", completion(SWAPPED, reply_ids=[2, 2]))
    _, report = measured(local.url, tmp_path, "--images", "1")
    assert "greedy" not in failed(report)
    assert "1 replies leave" in next(e["warning"] for e in report["checks"] if e["id"] == "greedy")


def broken(**changes: Any) -> dict[str, Any]:
    return completion() | changes


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ((400, '{"error": {"message": "top_logprobs 10 exceeds 5"}}'), "HTTP 400: top_logprobs 10 exceeds 5"),
        ((401, '{"error": "Unauthorized"}'), "HTTP 401: Unauthorized"),
        ((200, "{"), "not a chat completion"),
        ((200, json.dumps(broken(prompt_logprobs=None))), "no token ids and probabilities"),
        ((200, json.dumps(broken(prompt_token_ids=None))), "no token ids and probabilities"),
        ((200, json.dumps(broken(prompt_token_ids=[7]))), "differ in number"),
        ((200, json.dumps(completion(reply_ids=[]))), "not one token generated"),
        ((200, json.dumps(completion()).replace(str(math.log(0.91)), "NaN")), "NaN is no probability"),
        (None, "ended before the reply was complete"),
    ],
)
def test_faults_of_the_service_are_explained(
    local: Service, tmp_path: Path, answer: tuple[int, str] | None, named: str
) -> None:
    local.override["image"] = answer
    status, report = measured(local.url, tmp_path)
    assert (status, report["verdict"]) == (1, "FAIL")
    assert named in found(report, "service")
    if answer:
        assert found(report, "service").startswith("4 of 8 replies unusable: image-1: ")
        assert "text-1" not in found(report, "service")
    assert report["checks"][0]["fix"]
    assert (report["samples"], report["positions"]) == (None, None)


def test_closed_port_is_not_measured(closed_url: str, tmp_path: Path) -> None:
    status, report = measured(closed_url, tmp_path)
    assert (status, report["verdict"]) == (2, "ERROR")
    assert "no connection" in found(report, "service")


def test_hanging_service_fails_at_the_first_prompt(silent_url: str, tmp_path: Path) -> None:
    status, report = measured(silent_url, tmp_path, "--timeout", "0.05")
    assert (status, failed(report)) == (1, {"service"})
    assert "no reply" in found(report, "service")


def test_without_torch_nothing_is_measured(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import fail
    service.override["image"] = service.override["text"] = (200, json.dumps(completion()))
    status, report = measured(service.url, tmp_path)
    assert (status, report["verdict"]) == (2, "ERROR")
    assert "needs transformers" in found(report, "reference")


@pytest.mark.parametrize("bad", ["--top-k=0", "--fail-ratio=inf", "--images=0", "--min-top1=-1"])
def test_unusable_arguments_are_refused(bad: str) -> None:
    with pytest.raises(SystemExit) as refused:
        eval_served.parse_args(["--model", "x", "--output", "y", bad])
    assert refused.value.code == 2
