"""Measure what the trainer does when things go wrong, with the real trainer on tiny models.

    python tests/faults.py [NAME...]        all of it takes about an hour on two cores

Prints a line for each fault: what was tried, how often, how many cases were as they should be. What was not goes to
stderr at once. Exits with 1 if anything failed.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "src")]
os.environ.pop("LOCAL_RANK", None)

from faults_disk import disk_full, soak  # noqa: E402
from faults_hosts import ports, two_hosts  # noqa: E402
from faults_kill import dies_before_it_began, hangs, kills, memory, rank_dies, rank_dies_early, write_order  # noqa: E402
from faults_signals import hangup, one_rank_diverges, second_ctrl_c, signals  # noqa: E402

FAULTS = {
    "kill": partial(kills, 200, in_saves=100),
    "order": write_order,
    "disk": partial(disk_full, 20),
    "signals_1": partial(signals, ("the process",)),
    "signals_2": partial(signals, ("one rank", "all ranks", "the launcher")),
    "second": second_ctrl_c,
    "rank": partial(rank_dies, 5),
    "rank_early": partial(rank_dies_early, 4),
    "begun": dies_before_it_began,
    "hangs": hangs,
    "two_hosts": two_hosts,
    "hangup": hangup,
    "memory": memory,
    "ports": ports,
    "diverge": one_rank_diverges,
    "soak": partial(soak, 100_000),
}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(FAULTS):
        print(f"error: no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    failed = False
    for name in names or FAULTS:
        begin = time.monotonic()
        result = FAULTS[name]()
        failed = failed or bool(result.failures)
        print(f"{name}: {result} [{time.monotonic() - begin:.0f} s]", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
