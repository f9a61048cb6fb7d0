"""redaction.py: what counts as a secret, and that none is left in any spelling."""

from __future__ import annotations

import json

import pytest

import redaction

AWKWARD = "p%w$d'\"<&>\\é"


@pytest.mark.parametrize(
    ("words", "secrets"),
    [
        (["--api-key", "one", "two", "--port", "8000"], {"one", "two"}),
        (["--api-key=one"], {"one"}),
        (["--hf-token", "one"], {"one"}),
        (["VLLM_API_KEY=a=b"], {"a=b"}),
        (["Environment=VLLM_API_KEY=one"], {"one"}),
        (["--env=VLLM_API_KEY=one"], {"one"}),
        (["SECRET=one", "password=two", "X-TOKEN=three"], {"one", "two", "three"}),
        (["--seed", "1024", "MONKEY=1", "KEYS=1", "TOKENIZER=1", "--max-num-batched-tokens", "4096"], set()),
        (["--api-key", "--port", "8000"], set()),
        (["HF_TOKEN="], set()),
    ],
)
def test_secrets_are_known_by_name_or_flag(words: list[str], secrets: set[str]) -> None:
    assert redaction.secrets(words) == secrets
    masked = redaction.masked(words)
    assert len(masked) == len(words)
    assert not any(secret in word for secret in secrets for word in masked)


def test_what_is_no_secret_stays() -> None:
    assert redaction.masked(["serve", "--api-key=x", "--port", "1"]) == ["serve", "--api-key=(hidden)", "--port", "1"]


@pytest.mark.parametrize(
    "text",
    [
        AWKWARD,
        json.dumps({"value": AWKWARD}),
        json.dumps({"value": AWKWARD}, ensure_ascii=False),
        json.dumps(AWKWARD).replace("<", "\\u003c").replace("&", "\\u0026").replace(">", "\\u003e"),
        repr([AWKWARD]),
        "'p%%w$$d\\'\"<&>\\\\é'",
    ],
)
def test_a_secret_is_found_in_every_spelling(text: str) -> None:
    hidden = redaction.redacted(f"before {text} after", [AWKWARD])
    assert hidden.startswith("before ")
    assert hidden.endswith(" after")
    assert redaction.MASK in hidden
    assert "p%" not in hidden


def test_a_secret_that_contains_another_is_hidden_whole() -> None:
    assert redaction.redacted("x secret-2 y secret", ["secret", "secret-2"]) == "x (hidden) y (hidden)"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("VLLM_API_KEY=ab", "VLLM_API_KEY=(hidden)"),
        ("'api_key': ['one', 'two'], 'port': 1", "'api_key': \"(hidden)\", 'port': 1"),
        ('{"hf-token": "a b", "n": 1}', '{"hf-token": "(hidden)", "n": 1}'),
        ("http://me:word@proxy:3128/", "http://(hidden)@proxy:3128/"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer (hidden)"),
        ("/etc/ssl/server.key: Permission denied", "/etc/ssl/server.key: Permission denied"),
        ("max_tokens=5, KeyError: 'x'", "max_tokens=5, KeyError: 'x'"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    ],
)
def test_what_stands_beside_a_telling_name_is_hidden_though_nobody_told_us(text: str, hidden: str) -> None:
    assert redaction.redacted(text, []) == hidden
    assert redaction.redacted(hidden, []) == hidden


def test_a_short_value_is_hidden_beside_its_name_alone() -> None:
    assert redaction.redacted("A_KEY=1 port 8001", ["1"]) == "A_KEY=(hidden) port 8001"
