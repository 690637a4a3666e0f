"""The devices that a program is compiled for: those at hand, or a TPU slice by its name."""

import importlib.util
import os
from collections.abc import Mapping

import jax

from mlpmem_jax.config.compile import ALLOWED_TOPOLOGIES, LOCAL
from mlpmem_jax.errors import ConfigError

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


def devices_of(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns the devices of a topology, in JAX's order.

    Call it before JAX has started a backend: a TPU that happens to be attached is left
    alone when another topology is asked for.

    Args:
        name: A valid `compile.topology`.
        num_slices: Slices joined by the network between them.

    Raises:
        ConfigError: libtpu refuses the name, or is not installed.
    """
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
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"compile.topology={name}: libtpu refuses it ({reason}); must be {ALLOWED_TOPOLOGIES}"
        ) from None
