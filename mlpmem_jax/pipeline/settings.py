"""Settings that combine several sections of a configuration."""

from collections.abc import Iterable

from mlpmem_jax.config.schema import Config
from mlpmem_jax.embedding.blocks import EmbeddingSettings


def embedding_settings(config: Config, names: Iterable[str] = ()) -> EmbeddingSettings:
    """Returns the windows of `embed`, and the states that are stored in arrays of these names."""
    return EmbeddingSettings.of(
        config.datastore,
        config.decoder.num_layers,
        within=config.attends_within,
        window_tokens=config.embedding_window_tokens,
        stride_tokens=config.embedding_stride_tokens,
        names=names,
    )
