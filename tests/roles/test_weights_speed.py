"""Hashing is as fast as `sha256sum` on all cores.

256 MiB here; for the real size: `WEIGHTS_SPEED_MIB=2200 pytest -s tests/roles/test_weights_speed.py`.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible.module_utils.weights_manifest import hash_files, list_files, recall, remember

MIB = int(os.environ.get("WEIGHTS_SPEED_MIB", "256"))
ROUNDS, MORE_ROUNDS = 3, 10


def seconds(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


@pytest.fixture(params=[1, 4], ids=["one file", "four files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    block = os.urandom(2**20)
    for index in range(request.param):
        with (tmp_path / f"model-{index}.safetensors").open("wb") as stream:
            for _ in range(MIB // request.param):
                stream.write(block)
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep it for three runs


def test_the_first_hash_is_as_fast_as_sha256sum_on_all_cores(folder: Path) -> None:
    listed, _ = list_files(folder)
    total = sum(file.size for file in listed.values())
    cores = str(len(os.sched_getaffinity(0)))
    command = ["xargs", "-0", "-P", cores, "-n", "1", "sha256sum"]
    names = "\0".join(str(folder / name) for name in listed).encode()

    def reference() -> None:
        subprocess.run(command, input=names, stdout=subprocess.DEVNULL, check=True)

    # Both find the files in the page cache. In turns, so that other work meets both; the best of each counts, and what
    # is slow in three rounds has seven more in which nothing else may run.
    times: list[tuple[float, float]] = []
    ours, theirs = 0.0, math.inf
    while len(times) < ROUNDS or (ours < 0.8 * theirs and len(times) < MORE_ROUNDS):
        times.append((seconds(lambda: hash_files(folder, listed)), seconds(reference)))
        ours, theirs = (total / min(column) / 1e6 for column in zip(*times, strict=True))
    print(f"{total / 1e6:.0f} MB in {len(listed)} file(s), {cores} cores: {ours:.0f} MB/s; sha256sum {theirs:.0f} MB/s")
    assert ours >= 0.8 * theirs

    hashes, _ = hash_files(folder, listed)
    remember(folder / "hashes.json", listed, hashes)
    again = seconds(lambda: recall(folder / "hashes.json", list_files(folder)[0]))
    print(f"again, unchanged: {again * 1000:.1f} ms")
    assert recall(folder / "hashes.json", listed) == hashes
    assert again < 1
