"""The releases a host keeps: one folder each, named by the release's id, readable by root alone.

    STORE/<id>/unit, environment     what is installed when the release is activated
    STORE/<id>/release.json          what it consists of, who staged it and when
    STORE/<id>/good                  there once it answered its known-answer request; its mtime says when last, and
                                     there is a word in it when the release was only tried
    STORE/history.jsonl              what was done with them, oldest first

A folder appears complete or not at all, by a rename.  Python 3.8, standard library only: it runs on the host.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from ansible.module_utils.provided import read, write_atomically


@dataclass(frozen=True)
class Release:
    """A kept release; ``good_at`` is seconds since the epoch, None as long as it was not found good.

    ``trial``: it was good, but nobody wanted it for more than to measure it.
    """

    id: str
    unit: str
    environment: str
    record: Dict[str, Any]
    good_at: Optional[float]
    trial: bool


class Store:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def get(self, identifier: str) -> Optional[Release]:
        """The release, None when there is none of this id or its folder is damaged."""
        names = ("unit", "environment", "release.json")
        unit, environment, record = (read(self.path(identifier, name)) for name in names)
        if unit is None or environment is None or record is None:
            return None
        try:
            content = json.loads(record)
        except ValueError:
            return None
        try:
            good_at: Optional[float] = os.stat(self.path(identifier, "good")).st_mtime
        except FileNotFoundError:
            good_at = None
        return Release(identifier, unit, environment, content, good_at, bool(read(self.path(identifier, "good"))))

    def folders(self) -> List[str]:
        names = sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []
        return [name for name in names if os.path.isdir(self.path(name))]

    def all(self) -> List[Release]:
        """Every kept release, the one found good last first, those never found good at the end."""
        # A run that was killed while it staged left a folder with a dot, complete or not: no release.
        names = [name for name in self.folders() if not name.startswith(".")]
        found = [release for release in map(self.get, names) if release]
        return sorted(found, key=lambda release: release.good_at or 0.0, reverse=True)

    def last_good(self) -> Optional[Release]:
        return next((release for release in self.all() if release.good_at), None)

    def stage(self, identifier: str, unit: str, environment: str, record: Dict[str, Any]) -> None:
        """Keeps a release.  Raises ``OSError``, of a full disk for one, and leaves nothing of it then."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        folder = tempfile.mkdtemp(dir=self.folder, prefix=".staging-")
        files = {"unit": unit, "environment": environment, "release.json": json.dumps(record, indent=2) + "\n"}
        try:
            for name, content in files.items():
                write_atomically(os.path.join(folder, name), content, 0o600)
        except BaseException:
            shutil.rmtree(folder)
            raise
        # What is there under this id is damaged: a complete one is not staged again.
        shutil.rmtree(self.path(identifier), ignore_errors=True)
        os.rename(folder, self.path(identifier))

    def mark_good(self, identifier: str, trial: bool = False) -> None:
        """A release that was wanted before remains so when it is tried."""
        path = self.path(identifier, "good")
        write_atomically(path, "trial\n" if trial and read(path) != "" else "", 0o600)

    def prune(self, keep: int, protect: str) -> List[str]:
        """Deletes all but ``protect`` and the ``keep`` that were good last, trials too; also what a killed run left."""
        wanted = [release.id for release in self.all() if not release.trial]
        stay = {*wanted[:keep], protect}
        gone = [name for name in self.folders() if name not in stay]
        for name in gone:
            shutil.rmtree(self.path(name))
        return gone

    def note(self, entry: Dict[str, Any]) -> None:
        with open(self.path("history.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def history(self, last: int) -> List[Dict[str, Any]]:
        entries = []
        for line in (read(self.path("history.jsonl")) or "").splitlines()[-last:]:
            try:
                entries.append(json.loads(line))
            except ValueError:  # half-written by a host that lost power: the releases matter more than the tale
                continue
        return entries
