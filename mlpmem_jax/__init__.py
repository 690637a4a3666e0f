"""mlpmem_jax: pretraining of language models with an MLP Memory, in JAX and Flax NNX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpmem_jax.pipeline.opened_run import open_run

__all__ = ["__version__", "open_run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports what needs JAX when it is first asked for: the command line starts without."""
    if name == "open_run":
        from mlpmem_jax.pipeline.opened_run import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
