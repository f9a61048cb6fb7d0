"""The commands of the runbooks: what an operator types, and where."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rendering import PROJECT

RUNBOOKS = PROJECT / "docs" / "runbooks"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Of another language, which has no commands.
OTHER = re.compile(r"^```(?!sh\n)\w+\n.*?^```$", re.MULTILINE | re.DOTALL)
#: What a command begins with; other code in the text is a message, a variable or a file.
PROGRAMS = frozenset(
    "ansible ansible-playbook ansible-vault base64 cat chmod cosign curl df dmesg docker du find free grep head"
    " journalctl kill ls lspci modelscope npu-smi openssl .venv/bin/pip ps python3 sha256sum ss ssh ssh-keygen stat"
    " systemctl tar timedatectl uname".split()
)
#: What stands for a value that only the site or the message has.
PLACEHOLDERS = frozenset("ARCHIVE CONTAINER DIGEST IMAGE KEY NEW_NAME PID TARGET".split())
CONTROLLER, HOST, GATEWAY, MONITOR = "controller", "host", "gateway", "monitoring host"
#: Pages whose commands are typed on the controller, whatever they are.
ON_CONTROLLER = ("bundle", "unbundle")


@dataclass(frozen=True)
class Command:
    """One command as it stands in a page, and whether in a block of its own rather than within a sentence."""

    page: str
    text: str
    in_block: bool

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def where(self) -> str:
        """As the pages say it: `inventory/` and Ansible are on the controller, all else on the host it is about."""
        program = self.words[0]
        if program.startswith("ansible") or program in ("cosign", "modelscope", "ssh"):
            return CONTROLLER
        if self.page in ON_CONTROLLER or "inventory" in self.text or "SHA256SUMS" in self.text:
            return CONTROLLER
        if re.search(r":9090\b|-u prometheus\b", self.text):
            return MONITOR
        return GATEWAY if "glm-ocr-gateway" in self.text else HOST

    @property
    def playbook(self) -> str:
        """The verb of an `ansible-playbook`, else empty."""
        program, *rest = self.words
        return Path(rest[0]).stem if program == "ansible-playbook" else ""


def commands(page: Path) -> list[Command]:
    """All commands of a page, in the order in which they stand there."""
    return list(_commands(page))


def _commands(page: Path) -> Iterator[Command]:
    name, text = page.stem, page.read_text()
    text = OTHER.sub("", text)
    for code in re.finditer(rf"{BLOCK.pattern}|`([^`]+)`", text, re.MULTILINE | re.DOTALL):
        block, inline = code.groups()
        for line in block.splitlines() if block else [" ".join(inline.split())]:
            first, _, rest = line.partition(" ")
            if first in PROGRAMS and rest:
                yield Command(name, line, bool(block))
