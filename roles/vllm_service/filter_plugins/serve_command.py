"""Render the `vllm serve` command from data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

#: Characters that mean nothing to systemd: an argument made of these needs no quotes.
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


def serve_flags(flags: Mapping[str, Any]) -> list[list[str]]:
    """One list per flag: its name with dashes, and its value when it takes one.

    ``True`` is a bare flag, ``False`` and ``None`` leave it out, a mapping or list becomes compact JSON.
    """
    rendered = []
    for name, value in flags.items():
        if value is True:
            rendered.append([f"--{name}"])
        elif isinstance(value, (Mapping, list)):
            rendered.append([f"--{name}", json.dumps(value, separators=(",", ":"))])
        elif value is not False and value is not None:
            rendered.append([f"--{name}", str(value)])
    return rendered


def contradictions(flags: Mapping[str, Any], contract: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each flag that does not say what its variable says; ``contract`` is {flag: {variable: value}}."""
    problems = []
    for flag, variables in contract.items():
        for variable, value in variables.items():
            # A number given with -e is text.
            if str(flags.get(flag)) != str(value):
                found = "nothing" if flags.get(flag) is None else flags[flag]
                problems.append(
                    f"vllm_service_flags: expected {flag}: {value}, as {variable} says; found {found}. "
                    f"Leave it to the variable: set {variable}"
                )
    return problems


def systemd_quote(argument: str) -> str:
    """One argument of an Exec line, per systemd.service(5) "Command lines" and systemd.syntax(7).

    ``%`` begins a specifier and ``$`` a variable: both are doubled.  Raises ``ValueError`` for a line break.
    """
    if "\n" in argument:
        raise ValueError(f"an argument of a systemd unit must be one line: {argument!r}")
    escaped = argument.replace("%", "%%").replace("$", "$$")
    if PLAIN.fullmatch(argument):
        return escaped
    return "'" + escaped.replace("\\", "\\\\").replace("'", "\\'") + "'"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"serve_flags": serve_flags, "contradictions": contradictions, "systemd_quote": systemd_quote}
