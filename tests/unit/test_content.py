"""The digest of a checkpoint's arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.training import content
from mlpmem_jax.training.content import digest_of


def _items():
    values = np.arange(24, 0, -1).astype(np.float32).reshape(2, 3, 4)
    return {"params": {"a": values, "b": values[0].copy()}, "loop": {"step": np.int32(3)}}


def _digest(items):
    return digest_of({k: {n: jnp.asarray(a) for n, a in part.items()} for k, part in items.items()})


def _flip(array, place):
    array.view(np.uint32)[place] ^= 1


CHANGES = {
    "a bit": lambda items: _flip(items["params"]["a"], (1, 2, 3)),
    "the first bit": lambda items: _flip(items["params"]["a"], (0, 0, 0)),
    "two elements exchanged": lambda items: items["params"]["a"][0, 1, :2].sort(),
    "two rows exchanged": lambda items: items["params"].update(a=items["params"]["a"][::-1]),
    "two arrays exchanged": lambda items: items["params"].update(
        a=items["params"]["b"], b=items["params"]["a"]
    ),
    "another shape": lambda items: items["params"].update(a=items["params"]["a"].reshape(4, 6)),
    "another dtype": lambda items: items["params"].update(a=items["params"]["a"].view(np.int32)),
    "another name": lambda items: items["params"].update(c=items["params"].pop("b")),
    "another step": lambda items: items["loop"].update(step=np.int32(4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_is_seen(change):
    items = _items()
    before = _digest(items)
    change(items)
    assert _digest(items) != before


def test_it_is_the_same_in_blocks_of_any_size(monkeypatch):
    before = _digest(_items())
    for elements in (1, 4, 8):
        monkeypatch.setattr(content, "_BLOCK_ELEMENTS", elements)
        assert _digest(_items()) == before
