"""Who makes what, where several processes do a stage together."""

import numpy as np
import pytest

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.agreement import refuse_differences, refuse_different
from mlpmem_jax.parallel.sharing import dealt, most_shared, share_of


def test_alone_everything_is_mine():
    assert share_of(range(5)) == [0, 1, 2, 3, 4]
    assert most_shared([3, 7]) == 2
    assert most_shared([]) == 0


@pytest.mark.parametrize("owner_B", [[0, 0, 0, 0], [0, 0, 2, 2], [0, 1, 2, 3], [1, 0, 1, 0]])
def test_each_part_goes_whole_and_in_order_to_one_owner(owner_B):
    owner_B = np.array(owner_B)
    parts = [(number, range(number * 10, number * 10 + 3)) for number in (0, 1, 4, 5, 6)]
    batches = dealt(parts, owner_B)
    taken = {}
    for owner in np.unique(owner_B):
        stream = np.concatenate([batch[owner_B == owner] for batch in batches])
        taken[int(owner)] = stream[stream >= 0].tolist()
    everything = [item for items in taken.values() for item in items]
    assert sorted(everything) == sorted(item for _, items in parts for item in items)
    for number, items in parts:
        owner = np.unique(owner_B)[number % len(np.unique(owner_B))]
        place = taken[int(owner)].index(number * 10)
        assert taken[int(owner)][place : place + 3] == list(items)


def test_nothing_to_do_makes_no_batch():
    assert dealt([], np.zeros(4, np.int64)) == []


def test_processes_that_differ_are_named_with_their_keys():
    first = {"seed": 0, "train.num_steps": 8}
    refuse_differences([first, dict(first)])
    with pytest.raises(ConfigError) as found:
        refuse_differences([first, first | {"seed": 1}, first, {"seed": 0}])
    assert found.value.messages == (
        "process 1 was started with different settings: seed=1, process 0 has 0",
        "process 3 was started with different settings: train.num_steps=nothing, process 0 has 8",
    )


def test_a_process_that_is_alone_agrees_with_itself():
    refuse_different({"seed": 0})
