"""The command line of this play, for another playbook: same inventory, limit, vault, user and variables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible import context

#: What somebody types in the terminal, once.
TYPED = {
    "ask_vault_pass": "--ask-vault-pass",
    "ask_pass": "--ask-pass",
    "become_ask_pass": "--ask-become-pass",
}


def ansible_again(words: Sequence[str]) -> list[str]:
    """``words`` in the place of this play's playbook.  Options that come later win, as Ansible has it."""
    return again(sys.argv, context.CLIARGS["args"], words)


def again(argv: Sequence[str], playbooks: Sequence[str], words: Sequence[str]) -> list[str]:
    program, *given = argv
    return [sys.executable, program, *(word for word in given if word not in playbooks), *words]


def ansible_folder(_: object) -> str:
    """Where this play was started: its command line may have relative paths."""
    return str(Path.cwd())


def asked_for(_: object) -> list[str]:
    return typed(context.CLIARGS)


def typed(options: Mapping[str, Any]) -> list[str]:
    """The options that have somebody type a password; `--vault-id NAME@prompt` is one."""
    prompts = [f"--vault-id {given}" for given in options.get("vault_ids") or () if str(given).endswith("@prompt")]
    return [flag for name, flag in TYPED.items() if options.get(name)] + prompts


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"ansible_again": ansible_again, "ansible_folder": ansible_folder, "asked_for": asked_for}
