"""Hide secrets: which names mark one, which of a command's words are one, and a text without them.

Python 3.8 and the standard library only: the support bundle takes it to the hosts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

MASK = "(hidden)"
#: Names of environment variables and flags whose value is a secret.
SECRET_NAME = re.compile(r"(^|[_-])(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
#: Shorter values are hidden beside their name only: replaced everywhere, "1" would take half of a text with it.
SHORTEST = 4

#: A value beside such a name, whatever it is: also of secrets that nobody told us about.
NAMED = re.compile(
    r"""( (?<![a-z0-9./]) (?:KEY|TOKEN|SECRET|PASSWORD) ["']? \s? [=:] \s? )
        (?! ["'[]* \(hidden\) )
        ( \[[^]\n]*\] | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | [^]\s,;"'})]+ )""",
    re.IGNORECASE | re.VERBOSE,
)
#: The user and password of http://user:password@proxy, and what follows "Authorization: Bearer".
UNNAMED = re.compile(r"(://)[^/\s:@\"']+:[^/\s@\"']+(?=@)|(\bBearer\s)\s*[\w.~+/=-]{8,}", re.IGNORECASE)


def marked(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every word of a command in two parts: what may be shown, and the secret behind it, which most do not have.

    Secrets are the values of ``NAME=value``, of ``--flag=value`` and of ``--flag value...`` (``vllm serve --api-key``
    takes several) whose name is a ``SECRET_NAME``.
    """
    after_flag = False
    for word in words:
        if after_flag and not word.startswith("-"):
            yield "", word
            continue
        name, rest = "", word
        # Environment=API_KEY=value and --env=API_KEY=value name it at the second "=".
        while "=" in rest and not SECRET_NAME.search(name):
            name, rest = rest.split("=", 1)
        secret = rest if SECRET_NAME.search(name) else ""
        after_flag = word.startswith("--") and bool(SECRET_NAME.search(word))
        yield word[: len(word) - len(secret)], secret


def secrets(words: Iterable[str]) -> set[str]:
    return {secret for _, secret in marked(words) if secret}


def masked(words: Iterable[str]) -> list[str]:
    return [shown + MASK if secret else shown for shown, secret in marked(words)]


def redacted(text: str, values: Iterable[str]) -> str:
    """``text`` without the secrets ``values``, wherever they stand, and without what stands beside a telling name."""
    spellings = {spelling for value in values if len(value) >= SHORTEST for spelling in spelled(value)}
    if spellings:
        longest_first = sorted(spellings, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, longest_first)), MASK, text)
    return UNNAMED.sub(lambda found: (found[1] or found[2]) + MASK, NAMED.sub(_hidden, text))


def spelled(value: str) -> set[str]:
    """``value`` as it stands in plain text, JSON, Python's repr and a systemd unit."""
    doubled = value.replace("$", "$$")
    unit = doubled.replace("%", "%%")
    in_json = {json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    # Go's encoder also escapes what HTML would misread.
    html = str.maketrans({"&": "\\u0026", "<": "\\u003c", ">": "\\u003e"})
    in_json |= {text.translate(html) for text in in_json}
    quoted = {text.replace("\\", "\\\\").replace("'", "\\'") for text in (doubled, unit)}
    return {value, doubled, unit, repr(value)[1:-1], *in_json, *quoted}


def _hidden(found: re.Match[str]) -> str:
    """What was quoted stays quoted, so that JSON stays JSON."""
    quote = {"[": '"', '"': '"', "'": "'"}.get(found[2][0], "")
    return found[1] + quote + MASK + quote
