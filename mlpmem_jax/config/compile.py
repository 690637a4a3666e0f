"""The section of the command `compile`."""

import re
from typing import Literal

from pydantic import field_validator

from mlpmem_jax.config.base import Section, runtime
from mlpmem_jax.config.types import Auto, Bytes, Count

Step = Literal["pretrain", "train", "embed", "decode"]
LOCAL = "local"
# Dimensions of a slice in chips. Sold as: v5p-128 is v5p:4x4x4 (two cores a chip are
# counted), v5e-256 is v5e:16x16.
# (v4 is left out: its topologies list cores, while programs run on chips.)
FAMILIES = {"v5p": 3, "v5e": 2, "v6e": 2}
ALLOWED_TOPOLOGIES = (
    f"{LOCAL} or FAMILY:SIZES in chips; families: "
    + ", ".join(f"{family} ({dims} sizes)" for family, dims in FAMILIES.items())
    + "; for example v5p:4x4x4 (sold as v5p-128), v5e:16x16 (v5e-256), v6e:8x8"
)
_NAME = re.compile(r"(\w+):([1-9][0-9]?(?:x[1-9][0-9]?)+)", re.ASCII)


class CompileConfig(Section):
    """The step that `compile` analyzes, and its devices; no stage depends on it."""

    topology: str = runtime("local", "this machine's devices, or a TPU slice in chips (v5p:4x4x4)")
    step: Step = runtime("train", "step to compile; train follows train.mode and train.inputs")
    num_prompts: Count = runtime(32, "prompts that the decode step continues at once")
    memory_bytes: Bytes | Auto = runtime(
        "auto", "limit per device for the step; auto: from the device's data sheet"
    )

    @field_validator("topology")
    @classmethod
    def _can_be(cls, value: str) -> str:
        if value == LOCAL:
            return value
        found = _NAME.fullmatch(value)
        if not found or found[1] not in FAMILIES:
            raise ValueError(f"must be {ALLOWED_TOPOLOGIES}")
        if FAMILIES[found[1]] != found[2].count("x") + 1:
            dims = f"{found[1]} slices have {FAMILIES[found[1]]} dimensions"
            raise ValueError(f"{dims}; must be {ALLOWED_TOPOLOGIES}")
        return value
