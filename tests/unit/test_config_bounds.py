"""Every number of the configuration has two bounds, and the code keeps its promises at both."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.config.base import Section
from mlpmem_jax.config.keys import INDEX, Key, Schema, all_keys, alternatives
from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Number:
    """One kind of number that a key, or an entry of its list, takes."""

    key: Key
    schema: Schema

    @property
    def path(self) -> str:
        in_list = "items" in self.key.schema
        # A list of sections has one entry more than there are: a new one.
        path = self.key.path + ".0" * in_list
        return path.replace(f".{INDEX}.", ".0.")

    @property
    def is_whole(self) -> bool:
        return self.schema["type"] == "integer"

    @property
    def low(self) -> tuple[float, float]:
        """The least value that is allowed, and the next one below."""
        if self.is_whole:
            return self.schema["minimum"], self.schema["minimum"] - 1
        if "exclusiveMinimum" in self.schema:
            bound = self.schema["exclusiveMinimum"]
            return math.nextafter(bound, math.inf), bound
        return self.schema["minimum"], math.nextafter(self.schema["minimum"], -math.inf)

    @property
    def high(self) -> tuple[float, float]:
        """The greatest value that is allowed, and the next one above."""
        if self.is_whole:
            return self.schema["maximum"], self.schema["maximum"] + 1
        if "exclusiveMaximum" in self.schema:
            bound = self.schema["exclusiveMaximum"]
            return math.nextafter(bound, -math.inf), bound
        return self.schema["maximum"], math.nextafter(self.schema["maximum"], math.inf)


def _numbers() -> list[Number]:
    return [
        Number(key, schema)
        for key in all_keys().values()
        for schema in alternatives(key.schema.get("items", key.schema))
        if schema.get("type") in ("integer", "number")
    ]


NUMBERS = _numbers()
each_number = pytest.mark.parametrize(
    "number", NUMBERS, ids=lambda n: f"{n.key.path}-{n.schema['type']}"
)


def _refused(path: str, value: Any) -> list[str]:
    """Returns what is said about the key itself; how it fits others is not asked here."""
    try:
        changed_config(Config(), {}, [f"{path}={value!r}"])
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
    assert "minimum" in number.schema or "exclusiveMinimum" in number.schema
    assert "maximum" in number.schema or "exclusiveMaximum" in number.schema


@each_number
def test_bounds_are_allowed_and_what_lies_beyond_is_refused(number):
    (least, below), (greatest, above) = number.low, number.high
    if number.path.endswith(".layer"):  # a union of two: 0 and 1.5 are beyond both
        below, above = (0, 10_001) if number.is_whole else (0.0, 1.5)
    assert not _refused(number.path, least)
    assert not _refused(number.path, greatest)
    for value in (below, above):
        (line,) = _refused(number.path, value)
        assert len(line) < 200


@each_number
def test_floats_can_be_held_in_float32(number):
    """Else 1e-50 is 0 on the devices, and 0 / 0 follows."""
    if number.is_whole:
        assert abs(number.high[0]) < 2**62
        return
    for bound, inner in ((number.schema.get("minimum"), number.low[0]), (None, number.high[0])):
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
    with pytest.raises(ConfigError) as caught:
        changed_config(Config(), {}, [f"{path}={value}"])
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
        with pytest.raises(ConfigError) as caught:
            changed_config(Config(), {}, [override])
        (line,) = caught.value.messages
        assert expected in line


def test_every_section_is_walked():
    sections = {key.path.split(".")[0] for key in all_keys().values() if "." in key.path}
    fields = Config.model_fields
    assert sections == {name for name in fields if isinstance(fields[name].default, Section)}
