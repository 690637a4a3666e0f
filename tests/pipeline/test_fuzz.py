"""Random command lines and damaged configurations end with one line each, never a traceback."""

import pytest

from benchmarks.fuzz import run_case


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_ends_in_a_traceback():
    """The cases of `python -m benchmarks.fuzz --seed 1 --cases 30`."""
    wrong = [found for number in range(30) if (found := run_case(number, seed=1))]
    assert not wrong, "\n\n".join(wrong)
