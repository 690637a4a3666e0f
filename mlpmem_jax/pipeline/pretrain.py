"""The decoder: trained on the corpus, or read from files of a pretrained one."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import say
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the decoder, besides the tokens."""
    if config.decoder.pretrained is not None:
        from mlpmem_jax.interop.tensors import TensorFiles

        weights = TensorFiles(config.decoder.pretrained).digest()
        return {"decoder": config.decoder.recipe(), "weights": weights}
    return {
        "seed": config.seed,
        "corpus": {"attention": config.corpus.attention},
        "decoder": config.decoder.recipe(),
        "pretrain": config.pretrain.recipe(),
    }


def stages(config: Config) -> list[Stage]:
    """Returns the one stage of this command."""
    layout = Layout(config)
    if config.decoder.pretrained is not None:
        return [_import_stage(config, config.decoder.pretrained)]
    return [
        Stage(
            artifact=layout.decoder,
            recipe=recipe(config),
            upstream=(layout.tokens,),
            build=functools.partial(_build, config),
            check=functools.partial(check_devices, config, "pretrain"),
            estimate=functools.partial(_estimate, config),
            need=functools.partial(_need, config),
        )
    ]


def _import_stage(config: Config, path: str) -> Stage:
    return Stage(
        artifact=Layout(config).decoder,
        recipe=recipe(config),
        upstream=(Layout(config).tokens,),
        build=functools.partial(_import, config, path),
        check=functools.partial(_check_import, config, path),
        estimate=lambda: {"model flops": 0.0},
    )


def _check_import(config: Config, path: str) -> None:
    """Compares files and tokenizer with the decoder, before text is read."""
    from mlpmem_jax.corpus.tokenizer import read_tokenizer
    from mlpmem_jax.interop.huggingface import checked_tensors

    assert config.tokenizer.path is not None
    tokenizer = read_tokenizer(config.tokenizer.path, config.tokenizer.separator)
    checked_tensors(path, config.decoder, tokenizer.vocab_size)


def _import(config: Config, path: str) -> Completion:
    import jax
    from flax import nnx

    from mlpmem_jax.interop.huggingface import load_decoder
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.networks import vocab_size
    from mlpmem_jax.training.networks import save_network

    mesh, size = make_mesh(config.mesh), vocab_size(config)
    decoder = load_decoder(path, config.decoder, size, mesh)
    artifact = Layout(config).decoder
    files = save_network(decoder, artifact, 0, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
    say(f"{artifact.relative}: {parameters:,} parameters read from {path}")
    counts = {"steps": 0, "parameters": parameters, "vocab_size": size}
    return Completion(counts=counts, files=files, measured={"model_flops": 0.0})


def _estimate(config: Config) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import pretraining_estimate

    return pretraining_estimate(config)


def _build(config: Config) -> Completion:
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.pipeline.tasks import pretrain_task

    return train_task(config, "pretrain", pretrain_task, Layout(config).decoder)


def _need(config: Config, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import pretraining_need

    return pretraining_need(config, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
