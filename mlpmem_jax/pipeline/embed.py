"""The decoder over the corpus: keys, memory inputs, labels and log-probabilities."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.resolve import compute_dtypes
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import SPLITS, Split, datastore_arrays
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the rows, besides tokens and decoder."""
    return {
        "datastore": config.datastore.recipe(),
        "corpus": {"attention": config.corpus.attention},
        **compute_dtypes(config, "decoder"),
    }


def stages(config: Config) -> list[Stage]:
    """Returns one stage a split."""
    layout = Layout(config)
    return [
        Stage(
            artifact=layout.datastore(split),
            recipe=recipe(config),
            upstream=(layout.tokens, layout.decoder),
            build=functools.partial(_build, config, split),
            check=functools.partial(check_devices, config, "datastore"),
            estimate=functools.partial(_estimate, config, split),
            need=functools.partial(_need, config, split),
        )
        for split in SPLITS
    ]


def _estimate(config: Config, split: Split) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import embedding_estimate

    return embedding_estimate(config, split)


def _build(config: Config, split: Split) -> Completion:
    from mlpmem_jax.corpus.tokens import TokenSplit
    from mlpmem_jax.embedding.embed import embed_split
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.estimates import embedding_estimate
    from mlpmem_jax.pipeline.settings import embedding_settings
    from mlpmem_jax.training.networks import finished_decoder

    layout = Layout(config)
    mesh = make_mesh(config.mesh)
    tokens = TokenSplit.open(layout.tokens, split)
    specs = datastore_arrays(config.datastore, config.decoder.width)
    arrays = embed_split(
        finished_decoder(config, mesh),
        tokens,
        layout.datastore(split),
        specs,
        embedding_settings(config, specs),
        mesh,
        f"embed {split}",
    )
    flops = embedding_estimate(config, split)["model flops"]
    return Completion(
        counts={"rows": tokens.num_rows}, arrays=arrays, measured={"model_flops": flops}
    )


def _need(config: Config, split: Split, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import embedding_need

    return embedding_need(config, split, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
