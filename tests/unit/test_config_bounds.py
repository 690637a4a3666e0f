"""Every number of the configuration has two bounds, and the code keeps its promises at both."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.config.base import Section
from mlpmem_jax.config.draft import Draft
from mlpmem_jax.config.keys import INDEX, Alternative, Key, all_keys
from mlpmem_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Number:
    """One kind of number that a key, or an entry of its list, takes."""

    key: Key
    alternative: Alternative

    @property
    def path(self) -> str:
        in_list = self.key.alternatives[0].kind == "list"
        # A list of sections has one entry more than there are: a new one.
        path = self.key.path + ".0" * in_list
        return path.replace(f".{INDEX}.", ".0.")

    @property
    def low(self) -> tuple[float, float]:
        """The least value that is allowed, and the next one below."""
        alternative = self.alternative
        if alternative.kind == "int":
            return alternative.ge, alternative.ge - 1
        if alternative.gt is not None:
            return math.nextafter(alternative.gt, math.inf), alternative.gt
        return alternative.ge, math.nextafter(alternative.ge, -math.inf)

    @property
    def high(self) -> tuple[float, float]:
        """The greatest value that is allowed, and the next one above."""
        alternative = self.alternative
        if alternative.kind == "int":
            return alternative.le, alternative.le + 1
        if alternative.lt is not None:
            return math.nextafter(alternative.lt, -math.inf), alternative.lt
        return alternative.le, math.nextafter(alternative.le, math.inf)


def _numbers() -> list[Number]:
    return [
        Number(key, alternative)
        for key in all_keys().values()
        for kind in key.alternatives
        for alternative in (kind.items if kind.kind == "list" else (kind,))
        if alternative.kind in ("int", "float")
    ]


NUMBERS = _numbers()
each_number = pytest.mark.parametrize(
    "number", NUMBERS, ids=lambda n: f"{n.key.path}-{n.alternative.kind}"
)


def _refused(path: str, value: Any) -> list[str]:
    """Returns what is said about the key itself; how it fits others is not asked here."""
    draft = Draft()
    draft.override(f"{path}={value!r}")
    try:
        draft.finish()
    except ConfigError as error:
        return [line for line in error.messages if line.startswith(f"{path}={value!r}: must be")]
    return []


def test_there_are_numbers_in_lists_and_unions_too():
    paths = {number.key.path for number in NUMBERS}
    assert {"seed", "compare.seeds", "generate.seed", "datastore.key.layer"} <= paths
    assert {"analyze.masses", "corpus.more.N.weight", "ablate.sweeps.N.values"} <= paths
    assert len(NUMBERS) > 130


@each_number
def test_every_number_has_two_bounds(number):
    a = number.alternative
    assert a.ge is not None or a.gt is not None
    assert a.le is not None or a.lt is not None


@each_number
def test_bounds_are_allowed_and_what_lies_beyond_is_refused(number):
    (least, below), (greatest, above) = number.low, number.high
    if number.path.endswith(".layer"):  # a union of two: 0 and 1.5 are beyond both
        below, above = (0, 10_001) if number.alternative.kind == "int" else (0.0, 1.5)
    assert not _refused(number.path, least)
    assert not _refused(number.path, greatest)
    for value in (below, above):
        (line,) = _refused(number.path, value)
        assert len(line) < 200


@each_number
def test_floats_can_be_held_in_float32(number):
    """Else 1e-50 is 0 on the devices, and 0 / 0 follows."""
    if number.alternative.kind == "int":
        assert abs(number.high[0]) < 2**62
        return
    for bound, inner in ((number.alternative.ge, number.low[0]), (None, number.high[0])):
        assert np.isfinite(np.float32(inner))
        if bound:
            assert abs(np.float32(bound)) >= np.finfo(np.float32).tiny
    decays = number.key.path.endswith(("beta1", "beta2", "gate_floor"))
    assert not decays or np.float32(number.high[0]) < np.float32(1)


@pytest.mark.parametrize(
    "value", ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e400", "-1e400", ".nan", ".inf"]
)
@pytest.mark.parametrize(
    "path", ["seed", "train.num_steps", "train.optimizer.epsilon", "compare.seeds.0",
             "targets.temperature", "datastore.key.layer", "generate.top_p"],
)  # fmt: skip
def test_numbers_of_any_length_are_one_short_line(path, value):
    draft = Draft()
    draft.override(f"{path}={value}")
    with pytest.raises(ConfigError) as caught:
        draft.finish()
    (line,) = caught.value.messages
    assert line.startswith(f"{path}=") and len(line) < 300


def test_seeds_within_the_bounds_give_different_numbers():
    import jax

    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    keys = {tuple(np.asarray(jax.random.key_data(jax.random.key(seed)))) for seed in seeds}
    assert len(keys) == len(seeds)


def test_the_issue_s_numbers_are_refused_with_the_configuration():
    for override, expected in (
        ("seed=9223372036854775808", "from 0 to 4294967295"),
        ("pretrain.num_steps=99999999999999999999", "from 1 to 1e9"),
        ("targets.temperature=1e-40", "from 1e-6 to 1e9"),
        ("generate.temperature=1e-40", "generate.sampling=greedy takes no temperature"),
        ("evaluate.bootstrap_samples=1e12", "from 100 to 1e6"),
        ("pretrain.optimizer.epsilon=1e-50", "from 1e-15 to 1"),
    ):
        draft = Draft()
        draft.override(override)
        with pytest.raises(ConfigError) as caught:
            draft.finish()
        (line,) = caught.value.messages
        assert expected in line


def test_every_section_is_walked():
    sections = {key.path.split(".")[0] for key in all_keys().values() if "." in key.path}
    from mlpmem_jax.config.schema import Config

    fields = Config.model_fields
    assert sections == {name for name in fields if isinstance(fields[name].default, Section)}
