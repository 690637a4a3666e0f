"""The device mesh: how many devices hold copies, parts of parameters, parts of widths."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.sharding import AXES, num_token_shards


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges devices as (data, fsdp, tensor).

    Args:
        config: Sizes; one may be "auto". `dcn_data` slices make up part of `data`.
        devices: Devices to use; none takes all devices of all processes.

    Returns:
        A mesh whose axes XLA partitions by itself (Auto).

    Raises:
        ConfigError: The sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    try:
        grid = _arranged(sizes, config.dcn_data, devices, split=False)
    except NotImplementedError:  # What JAX raises where no whole axes of the slice fit.
        # A mesh axis on part of a slice's axis has fewer links, but works.
        try:
            grid = _arranged(sizes, config.dcn_data, devices, split=True)
        except (NotImplementedError, ValueError) as error:
            shown = ", ".join(f"mesh.{a}={n}" for a, n in zip(AXES, sizes, strict=True))
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{shown}: no way to lay this out on the slice ({reason})") from None
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _arranged(
    sizes: tuple[int, ...], dcn_data: int, devices: Sequence[jax.Device], *, split: bool
) -> np.ndarray:
    if dcn_data == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // dcn_data, *sizes[1:]),
            (dcn_data, 1, 1),
            devices,
            process_is_granule=_one_slice(devices),
            allow_split_physical_axes=split,
        )
    return np.asarray(grid)


def single_device_mesh() -> jax.sharding.Mesh:
    """Returns the (1, 1, 1) mesh of the first local device."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def check_batch(mesh: jax.sharding.Mesh, key_name: str, value: int, accumulation: int = 1) -> None:
    """Checks that a global batch can be cut over the devices that hold different tokens.

    Args:
        key_name: The configuration key that holds the batch size.
        value: Windows in a batch, over all devices.
        accumulation: Parts into which a batch is cut before the devices share it.

    Raises:
        ConfigError: The batch is not a multiple of `accumulation` · data · fsdp.
    """
    shards = num_token_shards(mesh)
    parts = accumulation * shards
    if value % parts == 0:
        return
    nearest = max(parts, round(value / parts) * parts)
    why = f"mesh.data·mesh.fsdp={shards}"
    if accumulation > 1:
        why += f" times accumulation_steps={accumulation}"
    raise ConfigError(f"{key_name}={value} must be a multiple of {parts} ({why}), e.g. {nearest}")


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of the axes (data, fsdp, tensor).

    Raises:
        ConfigError: They do not fit the number of devices.
    """
    given = {axis: getattr(config, axis) for axis in AXES}
    described = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items())
    inferred = [axis for axis, size in given.items() if size == "auto"]
    if len(inferred) > 1:
        raise ConfigError(f"only one mesh size may be auto: {described}")
    known = math.prod(size for size in given.values() if size != "auto")
    if num_devices % known or (not inferred and num_devices != known):
        need = f"a multiple of {known}" if inferred else f"{known}"
        raise ConfigError(
            f"{described} need {need} devices, and there are {num_devices}: "
            "change the sizes or set one of them to auto"
        )
    sizes = {axis: num_devices // known if size == "auto" else size for axis, size in given.items()}
    if sizes["data"] % config.dcn_data:
        raise ConfigError(f"mesh.dcn_data={config.dcn_data} must divide mesh.data={sizes['data']}")
    return tuple(sizes[axis] for axis in AXES)


def _one_slice(devices: Sequence[jax.Device]) -> bool:
    # Machines without slices (GPU hosts, simulated devices) are joined process by process.
    return len({getattr(device, "slice_index", 0) for device in devices}) == 1
