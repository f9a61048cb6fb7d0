"""Reading what the stages and earlier runs wrote: JSON that follows its schema, or an error that says what to do."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import jsonschema

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
STANDARD_INPUT = Path("-")


class UnusableError(Exception):
    """A file that cannot be used; the text names it, the cause and the fix."""


def schema(name: str) -> dict[str, Any]:
    """A schema of ``files/schemas``.  Raises ``UnusableError``."""
    return dict(json.loads(read(SCHEMAS / f"{name}.schema.json")))


def load(path: Path, *rules: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that follows the schemas ``rules``.  Raises ``UnusableError``."""
    try:
        data = json.loads(read(path), parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text that could be written again
    except ValueError as error:
        raise UnusableError(f"{path.name}: expected JSON, found other text ({error}); write it again") from error
    except RecursionError as error:
        raise UnusableError(f"{path.name}: nested too deeply to be a result; write it again") from error
    for rule in rules:
        follow(path, data, rule)
    return dict(data)


def follow(path: Path, data: Any, rule: dict[str, Any]) -> None:
    """Raises ``UnusableError`` when what was read from ``path`` does not follow the schema."""
    if fault := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(rule).iter_errors(data)):
        raise UnusableError(
            f"{path.name}: against {rule.get('$id', 'the schema')} at {fault.json_path}: {fault.message[:300]}; "
            "write it with the scripts of this version"
        )


def read(path: Path) -> str:
    """The text of a file, of standard input for ``-``.  Raises ``UnusableError``."""
    if path == STANDARD_INPUT:
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UnusableError(f"{path.name}: expected in {path.parent}, found nothing; run what writes it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableError(f"{path.name}: cannot be read ({error}); check the file and its permissions") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; what was not measured is null")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number that can be kept; what was not measured is null")
    return value
