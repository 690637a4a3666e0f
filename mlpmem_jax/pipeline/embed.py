"""The decoder over the corpus: keys, memory inputs, labels and log-probabilities."""

import functools
from collections.abc import Sequence

from mlpmem_jax.pipeline import estimates, held_out_stages, needs
from mlpmem_jax.pipeline.changed_stages import row_stages
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split, datastore_arrays
from mlpmem_jax.store.manifest import Artifact, Completion


def stages(run: Artifacts) -> list[Stage]:
    """Returns one stage a split, and those of text that was appended later."""
    base = functools.partial(_stages, splits=("train",))
    appended = [*held_out_stages.token_stages(run), *row_stages(run, base)]
    return [*appended, *_stages(run, ("valid", "test")), *held_out_stages.row_stages(run)]


def _stages(run: Artifacts, splits: Sequence[Split]) -> list[Stage]:
    return [
        Stage(
            artifact=run.datastore(split),
            build=functools.partial(_build, run, split),
            check=functools.partial(check_devices, run, "datastore"),
            estimate=functools.partial(estimates.embedding_estimate, run, split),
            need=functools.partial(needs.embedding_need, run, split),
        )
        for split in splits
    ]


def _build(run: Artifacts, split: Split) -> Completion:
    return embedded(run, run.tokens, split, run.datastore(split))


def embedded(run: Artifacts, stream: Artifact, split: Split, rows: Artifact) -> Completion:
    """Makes the rows of a token stream.

    Args:
        split: Which of its splits.
        rows: Where the rows go.
    """
    from mlpmem_jax.corpus.tokens import TokenSplit
    from mlpmem_jax.embedding.embed import embed_split
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.networks import finished_decoder
    from mlpmem_jax.pipeline.settings import embedding_settings

    config = run.config
    mesh = make_mesh(config.mesh)
    tokens = TokenSplit.open(stream, split)
    specs = datastore_arrays(config.datastore, config.decoder.width)
    arrays = embed_split(
        finished_decoder(run, mesh, frozen=True),
        tokens,
        rows,
        specs,
        embedding_settings(config, specs),
        mesh,
        f"embed {split}",
    )
    flops = estimates.embedding_flops(run, tokens.num_rows)
    return Completion(
        counts={"rows": tokens.num_rows}, arrays=arrays, measured={"model_flops": flops}
    )
