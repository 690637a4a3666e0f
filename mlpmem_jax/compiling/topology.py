"""The devices that a program is compiled for: those at hand, or a TPU slice by its name."""

import importlib.util
import os
import re
from collections.abc import Mapping

import jax

from mlpmem_jax.errors import ConfigError

LOCAL = "local"
# Dimensions of a slice in chips. Sold as: v5p-128 is v5p:4x4x4 (two cores a chip are
# counted), v5e-256 is v5e:16x16.
# (v4 is left out: its topologies list cores, while programs run on chips.)
FAMILIES = {"v5p": 3, "v5e": 2, "v6e": 2}
EXAMPLES = "v5p:4x4x4 (sold as v5p-128), v5p:8x8x8 (v5p-1024), v5e:16x16 (v5e-256), v6e:8x8"
_NAME = re.compile(r"(\w+):(\d+(?:x\d+)+)")
# libtpu otherwise asks the metadata server of a TPU VM what machine this is, wants it for
# itself, and warns; what is said of the machine does not enter what is compiled.
_ENVIRONMENT: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def check_name(name: str) -> None:
    """Refuses a topology that cannot be.

    Raises:
        ConfigError: Names what is allowed.
    """
    if name == LOCAL:
        return
    found = _NAME.fullmatch(name)
    if not found or found[1] not in FAMILIES:
        raise _unknown(name, f"must be {LOCAL}, or FAMILY:SIZES in chips")
    wanted, given = FAMILIES[found[1]], found[2].count("x") + 1
    if given != wanted:
        raise _unknown(name, f"{found[1]} slices have {wanted} dimensions")


def devices_of(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns the devices of a topology, in JAX's order.

    Call it before JAX has started a backend: a TPU that happens to be attached is left
    alone when another topology is asked for.

    Args:
        name: "local", or a slice such as "v5p:4x4x4".
        num_slices: Slices joined by the network between them.

    Raises:
        ConfigError: The name is unknown, or libtpu is not installed.
    """
    check_name(name)
    if name == LOCAL:
        return list(jax.local_devices())
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"compile.topology={name} needs libtpu, which is not installed: "
            "pip install -r requirements-tpu.txt (no TPU is needed), or compile for local"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        raise _unknown(name, f"libtpu refuses it ({str(error).splitlines()[0]})") from None


def _unknown(name: str, why: str) -> ConfigError:
    families = ", ".join(f"{family} ({dims} sizes)" for family, dims in FAMILIES.items())
    return ConfigError(
        f"compile.topology={name}: {why}; families: {families}; for example {EXAMPLES}"
    )
