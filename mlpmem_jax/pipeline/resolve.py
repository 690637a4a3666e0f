"""Values of `auto` that depend on the machine, written out before recipes are built."""

from typing import Any

from mlpmem_jax.config.schema import Config

_NETWORKS = ("decoder", "memory")


def resolved(config: Config) -> Config:
    """Returns the configuration with the compute dtypes of the devices in place of `auto`.

    Recipes then hold what is computed: what one platform has begun, another with another dtype
    does not continue, nor call current.
    """
    changed: dict[str, Any] = {
        name: getattr(config, name).model_copy(update={"compute_dtype": default_compute_dtype()})
        for name in _NETWORKS
        if getattr(config, name).compute_dtype == "auto"
    }
    return config.model_copy(update=changed) if changed else config


def default_compute_dtype() -> str:
    """Returns the compute dtype of the devices of this run; starts JAX."""
    from mlpmem_jax.models.layers import resolve_dtype

    return str(resolve_dtype("auto").name)
