"""What the fleet's benchmark found, as a page; and what it reads in the output of others.  Nothing is run here."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NONE = "-"
DEPLOY, BY_HAND = "deploy.yml", "by hand"
ARMS = (DEPLOY, BY_HAND)
FEWEST, MOST = 1, 16
#: Wanted: the wall time at MOST hosts over that at FEWEST, and the cost of a host over that by hand.
TIMES_WANTED, RATIO_WANTED = 3.0, 2.0
#: Rounds below which a figure says little.
ROUNDS_WANTED = 3


@dataclass(frozen=True)
class Run:
    """One run over ``hosts`` hosts: seconds, megabytes, and SSH executions of each host."""

    arm: str
    hosts: int
    wall: float
    cpu: float
    largest_mb: float
    together_mb: float
    executions: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """Where and how it was measured; ``failures`` are the runs that gave no result."""

    when: str
    machine: str
    load: tuple[float, float]
    forks: int
    rounds: int
    counts: tuple[int, ...]
    failures: tuple[str, ...] = ()


def recap(output: str) -> dict[str, dict[str, int]]:
    """Of the last PLAY RECAP of ansible-playbook, by host."""
    lines = output.rpartition("PLAY RECAP")[2].splitlines()
    rows = [re.match(r"(\S+)\s+: (ok=\d+ .*)", line) for line in lines]
    return {
        row[1]: {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", row[2])}
        for row in rows
        if row is not None
    }


def unwanted(output: str, hosts: Sequence[str]) -> list[str]:
    """What says that it was no run over ``hosts`` that changed nothing."""
    found = recap(output)
    problems = [f"{host}: in no recap" for host in hosts if host not in found]
    problems += [f"{host}: in the recap" for host in found if host not in hosts]
    for host, counts in found.items():
        problems += [
            f"{host}: {name}={counts[name]}" for name in ("changed", "failed", "unreachable") if counts.get(name)
        ]
    return problems


def executions(log: str, addresses: Iterable[str]) -> tuple[int, ...]:
    """Of each address, in the log that the stand-ins of ssh, scp and sftp write: a line an execution."""
    counted = Counter(log.split())
    return tuple(counted[address] for address in addresses)


class Figures:
    """The runs, by arm and number of hosts."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs

    def of(self, arm: str, hosts: int, figure: Callable[[Run], float]) -> list[float]:
        return [figure(run) for run in self.runs if (run.arm, run.hosts) == (arm, hosts)]

    def median(self, arm: str, hosts: int, figure: Callable[[Run], float]) -> float | None:
        found = self.of(arm, hosts, figure)
        return statistics.median(found) if found else None

    def shown(self, arm: str, hosts: int, figure: Callable[[Run], float], digits: int = 1) -> str:
        """Median (lowest to highest)."""
        found = self.of(arm, hosts, figure)
        if not found:
            return NONE
        return f"{statistics.median(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"

    def ratio(self, hosts: int, figure: Callable[[Run], float]) -> float | None:
        """Of the deployment's median to that by hand."""
        return over(self.median(DEPLOY, hosts, figure), self.median(BY_HAND, hosts, figure))


def over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def wall(run: Run) -> float:
    return run.wall


def cpu(run: Run) -> float:
    return run.cpu


def verdict(value: float | None, wanted: float) -> str:
    return (
        f"{NONE} | {wanted:g} | not measured" if value is None else f"{value:.1f} | {wanted:g} | {met(value, wanted)}"
    )


def met(value: float, wanted: float) -> str:
    return "yes" if value <= wanted else "**no**"


def page(setting: Setting, runs: Sequence[Run]) -> str:
    figures = Figures(runs)
    samples = [len(figures.of(arm, hosts, wall)) for arm in ARMS for hosts in setting.counts]
    return "\n".join(
        [
            HEAD.format(
                when=setting.when,
                machine=setting.machine,
                before=setting.load[0],
                after=setting.load[1],
                samples=f"{min(samples)}" if min(samples) == max(samples) else f"{min(samples)} to {max(samples)}",
            ),
            *([FEW] if min(samples) < ROUNDS_WANTED else []),
            *([FAILED, *(f"- {failure}" for failure in setting.failures), ""] if setting.failures else []),
            *judged(figures),
            "",
            *measured(figures, setting.counts),
            "",
            *(compared(figures, hosts) for hosts in setting.counts),
            *(marginal(figures, arm, setting.counts) for arm in ARMS if len(setting.counts) > 1),
            "",
            METHOD.format(forks=setting.forks),
        ]
    )


def judged(figures: Figures) -> list[str]:
    times = over(figures.median(DEPLOY, MOST, wall), figures.median(DEPLOY, FEWEST, wall))
    rows = {
        f"wall time at {MOST} hosts, in times of that at {FEWEST}": verdict(times, TIMES_WANTED),
        f"wall time a host at {MOST}, in times of that by hand": verdict(figures.ratio(MOST, wall), RATIO_WANTED),
        f"CPU a host at {MOST}, in times of that by hand": verdict(figures.ratio(MOST, cpu), RATIO_WANTED),
    }
    lines = [f"| {what} | {found} |" for what, found in rows.items()]
    return ["## Wanted", "", "| of `deploy.yml` | measured | at most | met |", "|---|---|---|---|", *lines]


def measured(figures: Figures, counts: Sequence[int]) -> list[str]:
    columns: dict[str, tuple[Callable[[Run], float], int]] = {
        "wall s": (wall, 1),
        "wall s a host": (lambda run: run.wall / run.hosts, 2),
        "CPU s": (cpu, 1),
        "CPU s a host": (lambda run: run.cpu / run.hosts, 2),
        "largest process MB": (lambda run: run.largest_mb, 0),
        "all processes MB": (lambda run: run.together_mb, 0),
        "SSH executions a host": (lambda run: sum(run.executions) / run.hosts, 1),
    }
    lines = ["## Measured", "", f"| hosts | | runs | {' | '.join(columns)} |", f"|---|---|---|{'---|' * len(columns)}"]
    for hosts in counts:
        for arm in ARMS:
            shown = [figures.shown(arm, hosts, figure, digits) for figure, digits in columns.values()]
            lines.append(f"| {hosts} | {arm} | {len(figures.of(arm, hosts, wall))} | {' | '.join(shown)} |")
    return lines


def compared(figures: Figures, hosts: int) -> str:
    ratios = (figures.ratio(hosts, wall), figures.ratio(hosts, cpu))
    by_wall, by_cpu = (NONE if ratio is None else f"{ratio:.1f}" for ratio in ratios)
    return f"- {hosts} host{'s' if hosts > 1 else ''}: {by_wall} times the wall time by hand, {by_cpu} times the CPU."


def marginal(figures: Figures, arm: str, counts: Sequence[int]) -> str:
    """What one host more costs: the difference of the medians over the difference of the hosts."""
    few, many = min(counts), max(counts)
    shown = []
    for figure in (wall, cpu):
        low, high = figures.median(arm, few, figure), figures.median(arm, many, figure)
        shown.append(NONE if low is None or high is None else f"{(high - low) / (many - few):.2f}")
    return f"- One host more, from {few} to {many}, {arm}: {shown[0]} s of wall time, {shown[1]} s of CPU."


HEAD = """# What a deployment that changes nothing costs, by the number of hosts

Written by `make bench-fleet`; do not edit. `deploy.yml` over hosts that are as they should be, and beside it
`tests/bench_fleet/by_hand.sh`, which checks the same over SSH, as an operator would without this project.

{when}, {machine}. Load {before:.1f} before, {after:.1f} after. A figure is the median (lowest to highest) of
{samples} runs. The two are interleaved, their order alternates, and each round goes through all numbers of hosts. A
run counts when it found every host right and left it alone: `changed=0`, no finding, pictures with a known text read
on each.
"""
FEW = f"""**Fewer than {ROUNDS_WANTED} runs of some figures**: their range says little.
"""
FAILED = """Runs that gave no result:
"""
METHOD = """## What was measured

- The hosts are nodes of the lab: systemd-nspawn with systemd, SSH and Docker, on the machine that is the controller
  too. What the nodes do takes wall time from both; CPU and memory are those of the controller's processes alone.
- A fixture: the nodes' image is the lab's engine image with a `vllm` that hands the connections to its port to the
  one real engine, on another node. That all ask one engine makes answers slower than an engine of each host's own
  would.
- CPU is user and system time of the command and of all that it starts, the connections that ssh keeps open among
  them. Memory is resident, sampled four times a second: the largest process, and all together, where pages that forks
  share count once for each.
- SSH executions are calls of ssh, scp and sftp that name the host. Both keep one connection a host for the run and
  begin without. Both have {forks} hosts at a time: the deployment too, for it finds that no engine is to restart.
- By hand, on each host: a lock; clock, Python, systemd, disk, memory; Docker; devices, driver files and driver
  version; npu-smi: health, processes, memory; the image's id; checksums and modes of unit and environment, checksums
  of tools and scripts; the unit's state; the container's image, release and age; who holds the port; weights and
  driver files by stat, read again when something moved; one token generated; the smoke in a helper container, and its
  JSON fetched.
- By hand leaves out: batches for those whose engine would restart; the checks of the inventory; the model's headers
  and the driver's PCI devices; the pages of the report, of each host and of the fleet; what to do about a finding; and
  putting right what is wrong.
"""
