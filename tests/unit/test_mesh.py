"""Sizes of the mesh, their mistakes, and what happens without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MeshConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.parallel import mesh as meshes
from mlpmem_jax.parallel import sharding


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": "auto", "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_sizes(keys, sizes):
    assert meshes.mesh_sizes(MeshConfig(**keys), 8) == sizes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tensor": 3}, "mesh.tensor=3 need a multiple of 3 devices, and there are 8"),
        ({"data": 2, "fsdp": 2}, "need 4 devices, and there are 8"),
        ({"data": 16}, "mesh.data=16, .* need 16 devices, and there are 8"),
        ({"fsdp": "auto"}, "only one mesh size may be auto"),
        ({"dcn_data": 3}, "mesh.dcn_data=3 must divide mesh.data=8"),
    ],
)
def test_sizes_that_do_not_fit(keys, message):
    with pytest.raises(ConfigError, match=message):
        meshes.mesh_sizes(MeshConfig(**keys), 8)


def test_batch_must_divide():
    mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)
    meshes.check_batch(mesh, "train.batch_size", 16)
    with pytest.raises(ConfigError, match=r"train.batch_size=12 must be a multiple of 8 .*e.g. 16"):
        meshes.check_batch(mesh, "train.batch_size", 12)
    with pytest.raises(ConfigError, match=r"pretrain.batch_size=8 .* accumulation_steps=2"):
        meshes.check_batch(mesh, "pretrain.batch_size", 8, accumulation=2)


def test_spec_leaves_whole_what_does_not_divide():
    mesh = jax.sharding.AbstractMesh((2, 2, 4), sharding.AXES)
    spec = sharding.spec(("vocab", "embed"), (128, 32), mesh)
    assert spec == jax.sharding.PartitionSpec(("tensor",), ("fsdp",))
    assert sharding.spec(("heads", "embed"), (2, 3), mesh) == jax.sharding.PartitionSpec(None, None)
    assert sharding.spec(("vocab", "embed"), (128, 32), mesh, without="fsdp")[1] is None
    with pytest.raises(KeyError):
        sharding.spec(("width",), (8,), mesh)


def test_every_parameter_has_known_axes():
    """A logical name that no rule maps would fail only on a mesh."""
    config = DecoderConfig(
        width=16, num_layers=1, biases="all", norm="layer", positions="learned", activation="gelu"
    )
    decoder = nnx.eval_shape(lambda: Decoder(config, 20, rngs=nnx.Rngs(0)))
    mesh = meshes.single_device_mesh()
    shardings = sharding.state_shardings(nnx.state(decoder), mesh)
    assert all(isinstance(s, jax.sharding.NamedSharding) for s in jax.tree.leaves(shardings))


def test_one_device_needs_no_mesh():
    assert sharding.current_mesh() is None
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", "length") is x
    with jax.set_mesh(meshes.single_device_mesh()):
        assert sharding.current_mesh() is None


class _Slice:
    """Stands in for JAX's way to lay a mesh onto a slice of 16 × 16 chips."""

    def __init__(self, monkeypatch, *, possible):
        self.splits, self._possible = [], possible
        monkeypatch.setattr(meshes.mesh_utils, "create_device_mesh", self._lay)

    def _lay(self, sizes, devices, *, allow_split_physical_axes):
        self.splits.append(allow_split_physical_axes)
        if not (allow_split_physical_axes and self._possible):
            raise NotImplementedError("Failed to find assignment for an axis of size 8.\nSizes: …")
        return np.array(devices).reshape(sizes)


def test_part_of_an_axis_of_the_slice_is_taken_where_no_whole_axis_fits(monkeypatch):
    laid = _Slice(monkeypatch, possible=True)
    mesh = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert mesh.size == 1 and laid.splits == [False, True]


def test_what_cannot_be_laid_onto_a_slice_is_refused_in_one_line(monkeypatch):
    _Slice(monkeypatch, possible=False)
    expected = r"^mesh.data=1, mesh.fsdp=1, mesh.tensor=1: no way to lay this out on the slice \("
    with pytest.raises(ConfigError, match=expected + r"Failed to find .* size 8\.\)$"):
        meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
