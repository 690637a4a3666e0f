"""The section of the command `compile`."""

from typing import Literal

from mlpmem_jax.config.base import Section, runtime
from mlpmem_jax.config.data import Auto, PositiveInt

Step = Literal["pretrain", "train", "embed", "decode"]


class CompileConfig(Section):
    """What is compiled ahead of time, and for which devices; no stage depends on it."""

    topology: str = runtime(
        "local", "local: the devices at hand; or a TPU slice in chips, such as v5p:4x4x4"
    )
    step: Step = runtime(
        "train", "pretrain; train, as train.mode and train.inputs say; embed; decode"
    )
    num_prompts: PositiveInt = runtime(32, "prompts that the step decode continues at once")
    memory_bytes: PositiveInt | Auto = runtime(
        "auto", "memory of a device that the step must fit in; auto: as its data sheet says"
    )
