"""Fixtures for the lab: plays through ansible-runner, the node through testinfra, requests from outside the node.

The lab itself is up already (`make lab`).  `deployed` deploys once a session; a test that breaks the service
restores it, so tests run in any order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ansible_runner
import pytest
from testinfra.host import Host

from lab import FILES, INVENTORY, NODE, Play, Played, container_start, node_named
from rendering import PROJECT


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    """``play("deploy.yml", check=True, some_variable=1)``: the command an operator would type, in the lab."""

    def run(
        playbook: str,
        *,
        check: bool = False,
        inventories: Sequence[Path] = (INVENTORY,),
        limit: str = "ascend910",
        tags: str = "",
        **variables: Any,
    ) -> Played:
        private = tmp_path_factory.mktemp("runner")
        started = time.monotonic()
        result = ansible_runner.run(
            private_data_dir=str(private),
            project_dir=str(PROJECT),
            playbook=playbook,
            inventory=[str(path) for path in inventories],
            limit=limit,
            extravars=variables,
            cmdline=" ".join([*(["--check", "--diff"] if check else []), *(["--tags", tags] if tags else [])]) or None,
            quiet=True,
        )
        with result.stdout as stream:
            output = stream.read()
        print(output)
        failures = [
            str((event["event_data"].get("res") or {}).get("msg", ""))
            for event in result.events
            if event["event"] in ("runner_on_failed", "runner_on_unreachable")
        ]
        changed = sum(((result.stats or {}).get("changed") or {}).values())
        return Played(result.rc, output, changed, "\n".join(failures), time.monotonic() - started)

    return run


@pytest.fixture(scope="session")
def node() -> Host:
    return node_named(NODE)


@pytest.fixture(scope="session")
def url(node: Host) -> str:
    """The service's base URL as seen from outside the node."""
    return f"http://{node.backend.hostname}:8000"


@pytest.fixture(scope="session")
def deployed(play: Play) -> Played:
    """The service as the inventory wants it, validated."""
    result = play("deploy.yml")
    assert result.rc == 0, result.failures
    return result


@pytest.fixture
def service(deployed: Played, node: Host) -> Iterator[Host]:
    """The node with the deployed service; the test must neither restart it nor change what is installed."""
    before = container_start(node), node.check_output(FILES)
    yield node
    assert (container_start(node), node.check_output(FILES)) == before, "the running service was touched"


@pytest.fixture(scope="module")
def restored(deployed: Played, play: Play) -> Iterator[None]:
    """Whatever the module's tests do to the service, the next module finds the inventory's."""
    yield
    again = play("deploy.yml")
    assert again.rc == 0, again.failures


@pytest.fixture(scope="session")
def broken_image(deployed: Played, node: Host) -> str:
    """In the registry: an image that passes every check and does not start, because its `vllm` exits with 7."""
    broken = "registry.lab:5000/glm-ocr-lab/broken:1"
    image = node.check_output("docker container inspect --format '{{.Image}}' glm-ocr")
    node.check_output(
        "mkdir -p /tmp/broken && cd /tmp/broken"
        " && printf '#!/bin/sh\\necho this release is broken >&2\\nexit 7\\n' > vllm"
        f" && chmod +x vllm && printf 'FROM {image}\\nCOPY vllm /usr/local/bin/vllm\\n' > Dockerfile"
        f" && docker build --quiet --tag {broken} . && docker push --quiet {broken} && docker rmi {broken}"
    )
    return broken


@pytest.fixture(autouse=True)
def journal_of_a_failure(request: pytest.FixtureRequest, node: Host) -> Iterator[None]:
    """A failing test prints the journal."""
    yield
    report = request.node.stash.get(CALL_FAILED, False)
    if report:
        print(node.run("journalctl --unit 'glm-ocr*' --lines 120 --no-pager").stdout)


CALL_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    item.stash[CALL_FAILED] = item.stash.get(CALL_FAILED, False) or outcome.get_result().failed  # type: ignore[attr-defined]
