"""Accuracy of what is served: the running service's token probabilities against transformers on the CPU.

    python scripts/eval_served.py --model /opt/atomgit/weights/GLM-OCR-bf16 --base-url http://127.0.0.1:8000 \
        --model-name glm-ocr --output served_accuracy.json

The service gets chat requests, text and images, and answers greedily with the token ids and the probabilities of the
first ``--top-k`` tokens at every position of prompt and reply.  Then transformers computes the same positions from the
same prompts and pixels, with the service's own reply after them (teacher forcing), so that one differing token does
not spoil what follows: first in fp32 (the reference), then in bf16 (the noise floor: what bf16 itself costs); one
model in memory at a time.

This sees what no health check, no text smoke and no comparison of transformers with itself sees: a wrong rotary
embedding, chat template, image processor or weight in the engine.  It does not see a fault that both sides read from
the same folder; the smoke's known answers do.

The formulas, all in ``tensor_metrics.py``: coarse_kl = KL(reference || service) over the tokens the service names, all
others being one outcome; kl_noise = mean of sqrt(2 coarse_kl), in nats; margin = ln p of the reference's first token
minus that of its second.

====================  ================================================================================================
check                 passes when
====================  ================================================================================================
service               it answered all requests with ids and probabilities (no connection: exit status 2)
prompt_tokens         both sides made the same token ids of every prompt: chat template, number of image tokens
top_k                 at every position of a reply each side's first token is among the other's first ``--top-k``, the
                      rule of vLLM's own tests (check_logprobs_close)
top1                  both name the same first token on 99 % of the positions, prompts included, where the reference is
                      sure by at least 1 nat; elsewhere rounding may decide
greedy                the reference's own greedy reply is the service's, or leaves it where the reference is within 1
                      nat of a tie; 25 % of the prompts may leave it elsewhere, with a warning: on pictures a model
                      cannot read, rounding decides more than that
kl_image, kl_text     kl_noise of the service at most 2 times the noise floor's, with a warning above 1.5; over prompt
                      and reply.  Healthy bf16 engines are near 1, whatever the weights; prompts with images are judged
                      apart so that text cannot dilute a fault of the vision path
====================  ================================================================================================

Positions of a prompt are compared where both sides made the same ids of it.

Exit status: 0 every check passed, 1 a check failed, 2 could not measure.  The JSON is written in all three cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import accuracy_cases
import chat_api
import local_model
import ocr_lines
from accuracy_cases import Case
from accuracy_report import check, closed, envelope, finish, progress, shown, unmeasured
from local_model import LocalModelError
from stage_result import finite, positive
from tensor_metrics import Position, coarse_kl, ratio, summary

STAGE = "served_accuracy"
KINDS = ("image", "text")

FIX_SERVICE = "Start the service, or correct --base-url, then look at its log."
FIX_STATUS = {
    400: "Look at the message: --top-k is bounded by the service's --max-logprobs (20 by default). A gateway that "
    "passes named fields only must pass logprobs, top_logprobs, prompt_logprobs and return_token_ids: ask vLLM itself.",
    401: "Set VLLM_API_KEY in the environment of this script to the key of the service.",
    404: "Make --model-name equal to the service's --served-model-name, and --base-url its root without /v1.",
}
FIX_LOG = "Look at the service's log for the cause, then restart it."
FIX_REPLY = "Make sure that vLLM 0.18 or later itself, and no other server, answers at --base-url."
FIX_PROMPT = (
    "Serve with the chat template and preprocessor_config.json of the weights (no --chat-template, no "
    "--mm-processor-kwargs), and with a transformers that reads them as this one does."
)
FIX_ENGINE = (
    "The engine computes something else than the weights say. Only images wrong: vision tower, image mean and std, or "
    "the rotary embedding (on an NPU the one of vllm-ascend 0.18.0rc1, issues 6925 and 12765). Texts too: the weights "
    "it loaded, quantisation, or the text layers."
)


@dataclass(frozen=True)
class Config:
    """The command line; ``decided_margin`` is in nats, ``timeout`` in seconds, ``max_tokens`` counts a reply's."""

    model: Path
    base_url: str
    model_name: str
    output: Path
    images: int
    scale: int
    seed: int
    top_k: int
    max_tokens: int
    warn_ratio: float
    fail_ratio: float
    min_top1: float
    max_diverging: float
    decided_margin: float
    timeout: float


LogProbs = Mapping[int, float]
"""Token id to ln p: a part of one position's distribution."""


@dataclass(frozen=True)
class Served:
    """What the service said to one prompt; ``prompt`` has a distribution for every id but the first."""

    prompt_ids: list[int]
    reply_ids: list[int]
    prompt: list[LogProbs]
    reply: list[LogProbs]
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Compared:
    """One position: service and noise floor against the reference."""

    served: Position
    floor: Position
    in_top_k: bool
    gap: float
    """ln p, in the reference, of its own first token minus that of the service's first token, in nats."""


class ServiceError(Exception):
    """A reply that cannot be compared: what was found and what to do about it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


def ask_all(config: Config, prompts: Sequence[Case]) -> list[Served]:
    """Every prompt's reply.  Raises ``ServiceError`` for all unusable ones at once, and as ``chat_api.send`` does."""
    served, unusable = [], []
    for index, case in enumerate(prompts, 1):
        progress(f"service: prompt {index} of {len(prompts)}")
        try:
            served.append(ask(config, case))
        except ServiceError as error:
            unusable.append((case.name, error))
    if unusable:
        found = "; ".join(f"{name}: {error}" for name, error in unusable)
        raise ServiceError(f"{len(unusable)} of {len(prompts)} replies unusable: {found}", unusable[0][1].fix)
    return served


def ask(config: Config, case: Case) -> Served:
    """One chat request.  Raises ``ServiceError``, and as ``chat_api.send`` does."""
    payload = chat_api.chat_request(
        config.model_name,
        case.prompt,
        ocr_lines.data_url(case.image) if case.image else None,
        max_tokens=config.max_tokens,
    )
    payload |= {
        "logprobs": True,
        "top_logprobs": config.top_k,
        "prompt_logprobs": config.top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    url = config.base_url.rstrip("/") + "/v1/chat/completions"
    response = chat_api.send(url, payload, timeout_seconds=config.timeout)
    if response.status != 200:
        message = chat_api.server_message(response.body)
        raise ServiceError(f"HTTP {response.status}: {message}", FIX_STATUS.get(response.status, FIX_LOG))
    try:
        return parse_reply(response.body)
    except chat_api.MalformedReplyError as error:
        raise ServiceError(str(error), FIX_REPLY) from error


def parse_reply(body: str) -> Served:
    """vLLM's reply with ids and probabilities.  Raises ``chat_api.MalformedReplyError`` for anything else."""
    reply = chat_api.parse_reply(body)
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
        choice = data["choices"][0]
        served = Served(
            prompt_ids=[int(token) for token in data["prompt_token_ids"]],
            reply_ids=[int(token) for token in choice["token_ids"]],
            # The first id of a prompt has nothing before it, and no distribution.
            prompt=[{int(t): float(e["logprob"]) for t, e in row.items()} for row in data["prompt_logprobs"][1:]],
            reply=[
                {int(e["token"].removeprefix("token_id:")): float(e["logprob"]) for e in row["top_logprobs"]}
                for row in choice["logprobs"]["content"]
            ],
            text=reply.text,
            finish_reason=reply.finish_reason,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise chat_api.MalformedReplyError(
            f"no token ids and probabilities ({type(error).__name__}: {error})"
        ) from error
    lengths = (len(served.prompt) + 1, len(served.reply))
    if lengths != (len(served.prompt_ids), len(served.reply_ids)) or not all((*served.prompt, *served.reply)):
        raise chat_api.MalformedReplyError("token ids and probabilities differ in number")
    if not served.reply_ids:
        raise chat_api.MalformedReplyError("not one token generated")
    return served


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no probability")


def local_prompts(config: Config, prompts: Sequence[Case]) -> list[dict[str, Any]]:
    """The tensors of every prompt as the weights' own processor makes them.  Raises ``LocalModelError``."""
    processor = local_model.load_processor(config.model)
    return [local_model.encode(processor, case.prompt, case.image) for case in prompts]


def local_distributions(
    config: Config, dtype: str, inputs: Sequence[Mapping[str, Any]], served: Sequence[Served]
) -> list[list[LogProbs]]:
    """ln p by one model, per prompt for every position but the last: of its own first ``top_k + 1`` tokens and of those
    the service named at that position.  Raises ``LocalModelError``."""
    torch = local_model.required("torch")
    model = local_model.load_model(config.model, getattr(torch, dtype), "cpu", attention="eager")
    result: list[list[LogProbs]] = []
    for index, (tensors, reply) in enumerate(zip(inputs, served, strict=True), 1):
        progress(f"{dtype} on the CPU: prompt {index} of {len(inputs)}")
        try:
            with torch.inference_mode():
                logits = model(**local_model.with_reply(tensors, reply.reply_ids), use_cache=False).logits[0, :-1]
            rows = logits.float().log_softmax(-1)
        except Exception as error:
            raise local_model.unusable(config.model, "cpu", error) from error
        named = aligned(tensors["input_ids"][0].tolist(), reply)
        distributions: list[LogProbs] = []
        for row, wanted in zip(rows, named, strict=True):
            ids = sorted({*row.topk(min(config.top_k + 1, len(row))).indices.tolist(), *(wanted or ())})
            # An id outside the model's vocabulary cannot be looked up, and has no probability in it.
            known = [token for token in ids if token < len(row)]
            distributions.append(dict(zip(known, row[known].tolist(), strict=True)))
        result.append(distributions)
    del model
    gc.collect()
    return result


def aligned(ids: Sequence[int], reply: Served) -> list[LogProbs | None]:
    """The service's distribution beside every local position but the last; None where it saw another prompt."""
    prompt: Sequence[LogProbs | None] = reply.prompt if list(ids) == reply.prompt_ids else [None] * (len(ids) - 1)
    return [*prompt, *reply.reply]


def compare(served: LogProbs, reference: LogProbs, floor: LogProbs, top_k: int) -> Compared:
    """One position; ``reference`` and ``floor`` know the ids of ``served`` and their own first ones."""
    ranked = sorted(reference, key=lambda token: reference[token], reverse=True)
    served_ranked = sorted(served, key=lambda token: served[token], reverse=True)
    first, served_first, floor_first = ranked[0], served_ranked[0], max(floor, key=lambda token: floor[token])
    margin = reference[first] - reference[ranked[1]]
    # The floor is cut down to what the service names, so that both KLs are of the same outcomes.
    floor_named = {token: floor[token] for token in served if token in floor}
    return Compared(
        served=Position(coarse_kl(reference, served), served_first == first, margin),
        floor=Position(coarse_kl(reference, floor_named), floor_first == first, margin),
        in_top_k=served_first in ranked[:top_k] and first in served_ranked[:top_k],
        gap=reference[first] - reference.get(served_first, -float("inf")),
    )


def compare_case(
    case: Case, ids: Sequence[int], reply: Served, reference: Sequence[LogProbs], floor: Sequence[LogProbs], top_k: int
) -> dict[str, Any]:
    """One prompt: its row in the report under ``sample``, and its positions."""
    start = len(ids) - 1  # the position that predicts the reply's first token
    peers = zip(aligned(ids, reply), reference, floor, strict=True)
    compared = [compare(peer, exact, rounded, top_k) if peer else None for peer, exact, rounded in peers]
    replies = [entry for entry in compared[start:] if entry]
    divergence = next((index for index, entry in enumerate(replies) if entry.gap > 0), None)
    gap = None if divergence is None else replies[divergence].gap
    sample = {
        "name": case.name,
        "kind": case.kind,
        "prompt": case.prompt,
        "drawn": case.drawn,
        "served": reply.text,
        "finish_reason": reply.finish_reason,
        "reply_tokens": len(reply.reply_ids),
        "prompt_tokens": {"served": len(reply.prompt_ids), "reference": len(ids)},
        "same_prompt": list(ids) == reply.prompt_ids,
        "first_divergence": divergence,
        # An id that is not in the reference's vocabulary has no finite gap.
        "divergence_gap": None if gap is None or gap == float("inf") else gap,
        "outside_top_k": sum(not entry.in_top_k for entry in replies),
    }
    return {"sample": sample, "prompt": [entry for entry in compared[:start] if entry], "reply": replies, "gap": gap}


def judge(
    config: Config, results: Sequence[Mapping[str, Any]], positions: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The checks on the compared prompts."""
    samples = [result["sample"] for result in results]
    differing = [sample for sample in samples if not sample["same_prompt"]]
    yield check(
        "prompt_tokens",
        not differing,
        "the same token ids on both sides, for every prompt",
        "; ".join(
            f"{sample['name']}: {sample['prompt_tokens']['served']} served, "
            f"{sample['prompt_tokens']['reference']} by the weights' own processor"
            for sample in differing
        )
        or f"equal for all {len(samples)} prompts",
        FIX_PROMPT,
    )
    outside = sum(sample["outside_top_k"] for sample in samples)
    replied = sum(len(result["reply"]) for result in results)
    yield check(
        "top_k",
        not outside,
        f"each side's first token among the other's first {config.top_k}, at every position of the replies",
        f"{outside} of {replied} positions outside",
        FIX_ENGINE,
    )
    overall = positions["all"]["served"]
    agreement = overall["decided_top1_agreement"]
    yield check(
        "top1",
        agreement is not None and agreement >= config.min_top1,
        f"the same first token on {config.min_top1:.0%} of the positions decided by {config.decided_margin:g} nat",
        f"{shown(agreement)} of {overall['decided_positions']} decided positions, "
        f"{shown(overall['top1_agreement'])} of all {overall['positions']}",
        FIX_ENGINE,
    )
    diverging = [result for result in results if result["gap"] is not None]
    sure = [result for result in diverging if result["gap"] >= config.decided_margin]
    yield check(
        "greedy",
        len(sure) <= config.max_diverging * len(samples),
        f"the reference's greedy reply, or one that leaves it within {config.decided_margin:g} nat of a tie, for all "
        f"but {config.max_diverging:.0%} of the prompts",
        f"{len(samples) - len(diverging)} of {len(samples)} equal"
        + "".join(
            f"; {result['sample']['name']} differs from token {result['sample']['first_divergence']} by "
            f"{result['gap']:.3g} nats"
            for result in diverging
        ),
        FIX_ENGINE,
        warning=f"{len(sure)} replies leave the reference's where it is sure. {FIX_ENGINE}" if sure else None,
    )
    for kind in KINDS:
        served, noise = positions[kind]["served"], positions[kind]["noise_floor"]
        value = ratio(served["kl_noise"], noise["kl_noise"])
        yield check(
            f"kl_{kind}",
            value is not None and value <= config.fail_ratio,
            f"kl_noise at most {config.fail_ratio:g} times the noise floor's, better under {config.warn_ratio:g}",
            f"{shown(value)} times: {shown(served['kl_noise'])} nats, noise floor {shown(noise['kl_noise'])} "
            f"({served['positions']} positions)",
            FIX_ENGINE,
            warning=f"over {config.warn_ratio:g}. {FIX_ENGINE}" if value and value > config.warn_ratio else None,
        )


def run(config: Config) -> dict[str, Any]:
    """Ask, compute, compare; follows ``files/schemas/stage.schema.json`` and ``accuracy.schema.json``."""
    report = envelope(STAGE, asdict(config), "samples", "positions")
    checks = report["checks"]
    expected = "a reply with token ids and probabilities to every prompt"
    prompts = accuracy_cases.cases(config.images, config.scale, config.seed)
    try:
        served = ask_all(config, prompts)
        checks.append(check("service", True, expected, f"{len(served)} replies", ""))
        inputs = local_prompts(config, prompts)
        reference = local_distributions(config, "float32", inputs, served)
        floor = local_distributions(config, "bfloat16", inputs, served)
        results = [
            compare_case(case, tensors["input_ids"][0].tolist(), reply, exact, rounded, config.top_k)
            for case, tensors, reply, exact, rounded in zip(prompts, inputs, served, reference, floor, strict=True)
        ]
        report["samples"] = [result["sample"] for result in results]
        report["positions"] = {
            kind: summaries([r for r in results if kind in ("all", r["sample"]["kind"])], config.decided_margin)
            for kind in (*KINDS, "all")
        }
        checks += judge(config, results, report["positions"])
    except chat_api.UnreachableError as error:
        checks.append(unmeasured("service", expected, str(error), FIX_SERVICE))
    except chat_api.NoReplyError as error:
        checks.append(check("service", False, expected, str(error), FIX_LOG))
    except ServiceError as error:
        checks.append(check("service", False, expected, str(error), error.fix))
    except LocalModelError as error:
        checks.append(unmeasured("reference", "GLM-OCR in fp32 and bf16 on this CPU", error.found, error.fix))
    return closed(report)


def summaries(results: Sequence[Mapping[str, Any]], decided_margin: float) -> dict[str, Any]:
    """Service and noise floor over prompt and reply positions together."""
    positions = [entry for result in results for entry in (*result["prompt"], *result["reply"])]
    return {
        "served": summary([entry.served for entry in positions], decided_margin),
        "noise_floor": summary([entry.floor for entry in positions], decided_margin),
        "reply_positions": sum(len(result["reply"]) for result in results),
    }


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Raises ``SystemExit`` (status 2) for an unusable command line."""
    parser = argparse.ArgumentParser(description="Accuracy of a served GLM-OCR against transformers on the CPU.")
    parser.add_argument("--model", type=Path, required=True, help="folder with the weights that are served")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="root of the service, without /v1")
    parser.add_argument("--model-name", default="glm-ocr", help="served model name")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--images", type=positive, default=4, help="image prompts, of one and of two lines in turn")
    parser.add_argument("--scale", type=positive, default=4, help="size of the drawing in multiples of 28 px a line")
    parser.add_argument("--seed", type=int, default=1024, help="of the drawn texts")
    parser.add_argument("--top-k", type=positive, default=10, help="tokens with a probability at each position")
    parser.add_argument("--max-tokens", type=positive, default=64, help="longest reply, in tokens")
    parser.add_argument("--warn-ratio", type=finite, default=1.5, help="noise ratio over which to warn")
    parser.add_argument("--fail-ratio", type=finite, default=2.0, help="noise ratio over which to fail")
    parser.add_argument("--min-top1", type=finite, default=0.99, help="agreement on decided positions, a ratio")
    parser.add_argument("--max-diverging", type=finite, default=0.25, help="share of prompts, for the check greedy")
    parser.add_argument("--decided-margin", type=finite, default=1.0, help="margin of a decided position, in nats")
    parser.add_argument("--timeout", type=finite, default=120.0, help="seconds to wait for one reply")
    return Config(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print one line per check, write the JSON; returns the exit status."""
    config = parse_args(argv)
    return finish(run(config), config.output, "eval_served.py")


if __name__ == "__main__":
    sys.exit(main())
