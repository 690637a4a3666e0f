"""Which windows training is validated on: each once, and from the whole split."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.training.validation import Validator, validation_windows


class Windows:
    """Window n has the loss n and n + 1 tokens."""

    def __init__(self, num_windows):
        self.num_windows = num_windows
        self.seen = []

    def read(self, windows):
        assert (windows < self.num_windows).all()
        self.seen += windows.tolist()
        weight_BL = np.ones((len(windows), 2), np.float32) * (windows[:, None] + 1)
        loss = np.repeat(windows[:, None], 2, 1).astype(np.float32)
        return {"loss": loss, "weight": weight_BL, "lm_weight": weight_BL}


def _mean(source, batch_size, num_batches):
    def sums(network, frozen, batch):
        assert batch["loss"].shape == (batch_size, 2)
        return {
            "loss_sum": jnp.sum(batch["weight"] * batch["loss"]),
            "lm_sum": jnp.sum(batch["lm_weight"] * batch["loss"]),
            "weight_sum": jnp.sum(batch["weight"]),
        }

    mesh = single_device_mesh()
    validate = Validator(source, mesh, batch_size=batch_size, num_batches=num_batches, sums=sums)
    return validate((), ())


@pytest.mark.parametrize(
    ("num_windows", "batch_size", "num_batches"),
    [(1, 16, 8), (3, 16, 8), (16, 16, 1), (17, 16, 2), (40, 16, 8)],
)
def test_a_small_split_counts_whole_and_each_window_once(num_windows, batch_size, num_batches):
    number = np.arange(num_windows)
    expected = np.average(number, weights=number + 1)
    found = _mean(Windows(num_windows), batch_size, num_batches)
    assert found == {"loss": pytest.approx(expected), "lm": pytest.approx(expected)}


def test_a_large_split_is_sampled_from_end_to_end_without_repeats():
    source = Windows(1003)
    found = _mean(source, 4, 5)
    assert len(set(source.seen)) == len(source.seen) == 20
    bounds = np.arange(21) * 1003 // 20
    part = np.searchsorted(bounds, sorted(source.seen), side="right") - 1
    assert part.tolist() == list(range(20))
    number = np.asarray(source.seen)
    assert found["loss"] == pytest.approx(np.average(number, weights=number + 1), rel=1e-5)


def test_the_same_windows_each_time_and_of_any_number():
    first, second = (validation_windows(1 << 40, 100) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[0] < 1 << 34 and first[-1] > (1 << 40) * 98 // 100
