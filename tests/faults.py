"""Measure what the trainer does when things go wrong, with the real trainer on tiny models.

    python tests/faults.py [NAME...]        all of it takes about an hour on two cores

Prints a line for each fault of test_faults.FULL: what was tried, how often, how many cases were as they should be.
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("test_faults.py")

if __name__ == "__main__":
    chosen = [f"{TESTS}::test_faults_in_full" + f"[{name}]" * bool(name) for name in sys.argv[1:] or [""]]
    sys.exit(pytest.main(["-qs", *chosen]))
