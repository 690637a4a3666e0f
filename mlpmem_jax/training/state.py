"""The state of a training run, as pytrees with shardings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlpmem_jax.parallel.sharding import abstract_state, create_sharded

Flat = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
        step: int32 [], finished steps.
        params: What the optimiser changes, float32 masters.
        fixed: Variables that it does not (the memory's input statistics).
        optimizer: State of the optimiser.
    """

    step: jax.Array
    params: nnx.State
    fixed: nnx.State
    optimizer: Any

    def items(self) -> dict[str, Flat]:
        """Returns the items of a checkpoint, each a flat mapping of names to arrays."""
        return {
            "params": flatten(self.params),
            "fixed": flatten(self.fixed),
            "optimizer": flatten(self.optimizer),
            "loop": {"step": self.step},
        }

    def with_items(self, items: dict[str, Flat]) -> "TrainState":
        """Returns a state of this structure (this one may be abstract) with other arrays."""
        return TrainState(
            step=items["loop"]["step"],
            params=unflatten(self.params, items["params"]),
            fixed=unflatten(self.fixed, items["fixed"]),
            optimizer=unflatten(self.optimizer, items["optimizer"]),
        )


ITEM_NAMES = ("params", "fixed", "optimizer", "loop")
_EMPTY = "(nothing)"


def split_module(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """Returns a module's structure, its parameters and its other variables."""
    graphdef, params, fixed = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, params, fixed


def structure(build: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """Returns the structure of what `build` makes, without making it."""
    return split_module(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]


def flatten(tree: Any) -> Flat:
    """Returns the leaves of a pytree by readable path.

    A checkpoint that knows names and arrays alone survives changes of the classes around.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of one name"
    # Orbax refuses an item without arrays.
    return flat or {_EMPTY: jnp.zeros((), jnp.int32)}


def unflatten(tree: Any, flat: Flat) -> Any:
    """Puts arrays of `flatten` into the structure of `tree`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in names])


class Blueprint:
    """How to make a module and its training state on a mesh.

    Attributes:
        graphdef: The module's structure; `nnx.merge(graphdef, params, fixed)` makes it.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        optimizer: optax.GradientTransformation,
        seed: int,
        mesh: jax.sharding.Mesh,
    ):
        self._build = build
        self._optimizer = optimizer
        self._seed = seed
        self._mesh = mesh
        self.graphdef = structure(build)

    def _make(self) -> TrainState:
        module = self._build(nnx.Rngs(self._seed))
        _, params, fixed = split_module(module)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            fixed=fixed,
            optimizer=self._optimizer.init(params),
        )

    def create(self) -> TrainState:
        """Makes the initial state, each device its own part."""
        return create_sharded(self._make, self._mesh)

    def abstract(self) -> TrainState:
        """Returns shapes, dtypes and shardings, without making anything."""
        return abstract_state(self._make, self._mesh)
