"""The decoder: trained on the corpus, read from files of a pretrained one, or both."""

import functools

from mlpmem_jax.pipeline import estimates, needs
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Completion


def stages(run: Artifacts) -> list[Stage]:
    """Returns the one stage of this command."""
    path = run.config.decoder.pretrained
    if path is not None:
        run.sources.weights(path, again=True)  # Weights that changed are another decoder.
    if path is not None and run.config.pretrain.fine_tune == "none":
        return [
            Stage(
                artifact=run.decoder,
                build=functools.partial(_import, run, path),
                check=functools.partial(_check_import, run, path),
                estimate=lambda: {"model flops": 0.0},
            )
        ]
    return [
        Stage(
            artifact=run.decoder,
            build=functools.partial(_build, run),
            check=functools.partial(_check, run, path),
            estimate=functools.partial(estimates.pretraining_estimate, run),
            need=functools.partial(needs.pretraining_need, run),
        )
    ]


def _check(run: Artifacts, path: str | None) -> None:
    if path is not None:
        _check_import(run, path)
    check_devices(run, "pretrain")


def _check_import(run: Artifacts, path: str) -> None:
    """Compares files and tokenizer with the decoder, before text is read."""
    from mlpmem_jax.corpus.tokenizer import read_tokenizer
    from mlpmem_jax.interop.huggingface import checked_tensors

    config = run.config
    assert config.tokenizer.path is not None
    tokenizer = read_tokenizer(config.tokenizer.path, config.tokenizer.separator)
    checked_tensors(path, config.decoder, tokenizer.vocab_size)


def _import(run: Artifacts, path: str) -> Completion:
    from mlpmem_jax.interop.huggingface import load_decoder
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.network_stage import save_imported
    from mlpmem_jax.pipeline.networks import vocab_size

    config = run.config
    mesh, size = make_mesh(config.mesh), vocab_size(run)
    decoder = load_decoder(path, config.decoder, size, mesh)
    return save_imported(decoder, run.decoder, mesh, size, path)


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.pipeline.tasks import pretrain_task

    return train_task(run, "pretrain", pretrain_task, run.decoder)
