"""Logical axes of arrays mapped to axes of the mesh: the only file that names mesh axes.

Networks and losses name what a dimension *is* ("vocab", "batch"); this file decides where
it lies. Everything works without a mesh too: then every function here does nothing.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
TOKEN_AXES = (DATA, FSDP)  # different tokens lie on these
VOCAB_AXIS = TENSOR  # different parts of the vocabulary lie on this
LOGICAL_AXES = "logical_axes"  # the metadata of an nnx.Variable that holds the names

MeshAxes = str | tuple[str, ...] | None
Names = tuple[str | None, ...]

RULES: dict[str, MeshAxes] = {
    # Parameters.
    "layers": None,
    "vocab": TENSOR,
    "embed": FSDP,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_width": None,
    "ffn": TENSOR,
    "positions": None,
    # Activations.
    "batch": TOKEN_AXES,
    "tokens": TOKEN_AXES,
    "length": None,
    "state": None,
}


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the mesh set by `jax.set_mesh`, or None where one device does all."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def target_platform() -> str:
    """Returns the platform ("cpu", "gpu", "tpu") that the current computation is for.

    That of the devices of the mesh set by `jax.set_mesh`, which may be those of a topology
    that is only compiled for; without a mesh that of JAX's default devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def num_token_shards(mesh: Any) -> int:
    """Returns over how many parts of a mesh the tokens of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in TOKEN_AXES)


def spec(names: Names, shape: tuple[int, ...], mesh: Any, without: str | None = None) -> Any:
    """Maps logical names to a PartitionSpec.

    A dimension that its mesh axes do not divide stays whole, so that a model with four
    heads also runs on eight tensor-parallel devices.

    Args:
        names: One name (or None) a dimension.
        mesh: Concrete or abstract mesh.
        without: A mesh axis to leave out.

    Returns:
        The PartitionSpec.

    Raises:
        KeyError: A name is not in :data:`RULES`.
    """
    assert len(names) == len(shape), (names, shape)
    entries: list[MeshAxes] = []
    for name, size in zip(names, shape, strict=True):
        axes = RULES[name] if name is not None else None
        axes_tuple = (axes,) if isinstance(axes, str) else (axes or ())
        axes_tuple = tuple(axis for axis in axes_tuple if axis != without)
        fits = size % math.prod(mesh.shape[axis] for axis in axes_tuple) == 0
        entries.append(axes_tuple if axes_tuple and fits else None)
    return PartitionSpec(*entries)


def constrain(array: jax.Array, *names: str | None) -> jax.Array:
    """Fixes where an activation lies, by the logical names of its dimensions."""
    mesh = current_mesh()
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, spec(names, array.shape, mesh))


def gather_for_use(weight: jax.Array, names: Names) -> jax.Array:
    """Gathers a parameter over `fsdp`; its gradient is scattered back.

    Without this XLA may prefer to all-reduce activations instead of gathering weights.
    """
    return weight if current_mesh() is None else _gather(weight, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, names: Names) -> jax.Array:
    mesh = current_mesh()
    assert mesh is not None
    return jax.lax.with_sharding_constraint(weight, spec(names, weight.shape, mesh, without=FSDP))


def _gather_forward(weight: jax.Array, names: Names) -> tuple[jax.Array, None]:
    return _gather(weight, names), None


def _gather_backward(names: Names, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    mesh = current_mesh()
    assert mesh is not None
    # Twice: the sum is made over whole widths and scattered then. Told the second only, XLA
    # carries it into the activations and replicates them.
    whole = spec(names, gradient.shape, mesh, without=FSDP)
    gradient = jax.lax.with_sharding_constraint(gradient, whole)
    return (constrain(gradient, *names),)


_gather.defvjp(_gather_forward, _gather_backward)


def batch_sharding(mesh: jax.sharding.Mesh, num_dims: int = 2) -> NamedSharding:
    """Returns where a global batch lies: its first dimension over (data, fsdp)."""
    return NamedSharding(mesh, PartitionSpec(TOKEN_AXES, *(None,) * (num_dims - 1)))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the NamedSharding of every array of a state.

    Works on any pytree: parameters, optimiser moments (optax keeps the nnx.Variable of the
    parameter they belong to), counters. What carries no logical axes is replicated.

    Args:
        state: A pytree of arrays or ShapeDtypeStructs, in nnx.Variables or bare.

    Returns:
        A pytree of the same structure with a NamedSharding for each array.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        value = leaf.get_raw_value()
        if not hasattr(value, "shape"):
            return leaf  # Of another group of parameters: optax masks it, there is no array.
        names = leaf.get_metadata().get(LOGICAL_AXES)
        if names is None or len(names) != len(value.shape):
            return leaf.replace(replicated(mesh))
        return leaf.replace(NamedSharding(mesh, spec(names, value.shape, mesh)))

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def abstract_state(create: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the state that `create()` would return, as ShapeDtypeStructs with shardings."""
    abstract = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        state_shardings(abstract, mesh),
    )


def create_sharded(create: Any, mesh: jax.sharding.Mesh) -> Any:
    """Runs `create()`, which returns a state, so that each device makes only its part.

    The values do not depend on the mesh.

    Args:
        create: A function without arguments that returns a pytree (nnx.State).

    Returns:
        The state, laid out by :func:`state_shardings`.
    """
    shardings = state_shardings(jax.eval_shape(create), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=shardings)()


class HeadLayout(NamedTuple):
    """How tokens and an output head lie on the mesh while a loss is computed.

    Attributes:
        tokens: Spec of arrays whose first dim is the batch.
        head: Spec of a [V, D] head: gathered over `fsdp`, cut over the vocabulary.
        gradient: Spec of the head's gradient.
        token_axes: Axes over which tokens differ; sums over tokens run over them.
        vocab_axis: Axis that cuts the vocabulary, if any.
        scatter_axis: The one of `token_axes` that also cuts the gradient's width, if any.
    """

    tokens: PartitionSpec
    head: PartitionSpec
    gradient: PartitionSpec
    token_axes: tuple[str, ...]
    vocab_axis: str | None
    scatter_axis: str | None


def head_layout(mesh: Any, batch: int, head_shape: tuple[int, ...]) -> HeadLayout:
    """Returns the layout for a batch of `batch` windows and a head of shape [V, D].

    What does not divide stays whole: a batch of one window is computed by every device.
    """
    token_axes = TOKEN_AXES if batch % num_token_shards(mesh) == 0 else ()
    vocab_axis = VOCAB_AXIS if head_shape[0] % mesh.shape[VOCAB_AXIS] == 0 else None
    scatters = bool(token_axes) and head_shape[1] % mesh.shape[FSDP] == 0
    scatter_axis = FSDP if scatters else None
    return HeadLayout(
        tokens=PartitionSpec(token_axes or None),
        head=PartitionSpec(vocab_axis),
        gradient=PartitionSpec(vocab_axis, scatter_axis),
        token_axes=token_axes,
        vocab_axis=vocab_axis,
        scatter_axis=scatter_axis,
    )
