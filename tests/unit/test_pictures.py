"""Labels of pictures keep their distance."""

import numpy as np
import pytest

from mlpmem_jax.evaluation.style import _apart

GAP, LOW, HIGH = 10.0, 0.0, 200.0


@pytest.mark.parametrize("seed", range(20))
def test_labels_keep_their_order_and_a_gap_and_move_as_little_as_that_takes(seed: int):
    rng = np.random.default_rng(seed)
    wanted = list(rng.uniform(LOW, HIGH, int(rng.integers(1, 15))))
    moved = _apart(wanted, GAP, LOW, HIGH)
    order = np.argsort(wanted)
    assert np.all(np.diff(np.array(moved)[order]) >= GAP - 1e-9)
    assert min(moved) >= LOW - 1e-9 and max(moved) <= HIGH + 1e-9
    far = [place for place, one in enumerate(wanted) if _distance(wanted, place) > 15 * GAP]
    assert all(moved[place] == wanted[place] for place in far)


def _distance(wanted: list[float], place: int) -> float:
    others = [abs(wanted[place] - other) for n, other in enumerate(wanted) if n != place]
    return min(others, default=np.inf)


def test_two_labels_of_one_height_share_the_shift():
    assert _apart([50.0, 50.0], GAP, LOW, HIGH) == pytest.approx([45.0, 55.0])
    assert _apart([0.0, 0.0, 120.0], GAP, LOW, HIGH) == pytest.approx([0.0, 10.0, 120.0])
