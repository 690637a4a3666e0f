"""Prompts to text, with the memory interpolated in every step."""

import sys

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import is_speaker, note, say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline.evaluate import RESULTS
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.layout import Layout


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    if options.dry_run:
        return execute(lambda _: [], config, options)
    # Artifacts are checked before a device is touched.
    weight = 0.0 if options.without_memory else interpolation(config)
    generate(config, weight, with_memory=not options.without_memory)
    return 0


def interpolation(config: Config) -> float | None:
    """Returns λ as configured, as trained, or as `evaluate` chose it; None: the gate's.

    Raises:
        ArtifactError: The memory is not trained, or λ was never chosen.
    """
    layout = Layout(config)
    trained = layout.trained
    if not trained.is_complete():
        raise ArtifactError(
            f"{trained.path}: the memory is not trained yet; train it with the command "
            "`train`, or generate with --without-memory"
        )
    if config.generate.interpolation != "auto":
        return config.generate.interpolation
    if config.memory.gate == "learned":
        return None
    if config.trained_interpolation is not None:
        return config.trained_interpolation
    results = layout.results
    if not results.is_complete():
        raise ArtifactError(
            f"{results.path}: generate.interpolation=auto takes λ from the results of "
            "`evaluate`, and there are none; run `evaluate`, or set generate.interpolation "
            "to a number from 0 to 1"
        )
    made_from = results.verify().made_from
    if made_from.get(trained.relative) != trained.load().fingerprint:
        raise ArtifactError(
            f"{results.path}: λ was chosen for another memory than {trained.path}; run "
            "`evaluate --rebuild`, or set generate.interpolation"
        )
    return float(read_json(results.path / RESULTS)["systems"]["memory"]["interpolation"])


def generate(config: Config, weight: float | None, *, with_memory: bool) -> None:
    """Continues the prompts on the terminal.

    Args:
        config: The whole configuration.
        weight: λ; None: of the memory's gate.
        with_memory: Whether there is a memory.

    Raises:
        ArtifactError: A network or the tokenizer is missing, damaged, or fits no other.
    """
    from mlpmem_jax.corpus.tokenizer import load_tokenizer
    from mlpmem_jax.generation.decode import Generator
    from mlpmem_jax.generation.interpolated import InterpolatedModel
    from mlpmem_jax.generation.sampling import Sampling
    from mlpmem_jax.generation.stream import Screen, TextStream
    from mlpmem_jax.models.decoder import Site
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.prompts import prompts_of
    from mlpmem_jax.training.networks import finished_decoder, finished_networks

    layout, settings = Layout(config), config.generate
    tokenizer = load_tokenizer(layout.tokenizer)
    prompts = prompts_of(config, tokenizer)
    mesh = make_mesh(config.mesh)
    memory = None
    if with_memory or config.train.mode == "joint":
        decoder, memory = finished_networks(config, mesh)
    else:
        decoder = finished_decoder(config, mesh)
    if tokenizer.vocab_size != decoder.vocab_size:
        raise ArtifactError(
            f"{layout.tokenizer.path} has a vocabulary of {tokenizer.vocab_size} tokens and "
            f"{layout.decoder.path} one of {decoder.vocab_size}: use the tokenizer that the "
            "decoder was trained with"
        )
    model = InterpolatedModel(
        decoder,
        memory if with_memory else None,
        site=Site.of(config.datastore.input, config.decoder.num_layers),
        weight=weight,
        separator=tokenizer.separator_id,
        mesh=mesh,
    )
    sampling = Sampling(settings.sampling, settings.temperature, settings.top_k, settings.top_p)
    generator = Generator(model, sampling)
    ids = [list(map(int, each)) for each in tokenizer.encode(prompts)]
    how = "decoder alone"
    if with_memory:
        how = "λ of the gate" if weight is None else f"λ = {weight:.3f}"
    say(f"sample ({how}, {settings.sampling}):")
    out = sys.stdout if is_speaker() else None
    screen = Screen(out, prompts) if out else None
    streams = [TextStream(tokenizer.rust, skip=[tokenizer.separator_id]) for _ in prompts]
    seed = config.seed if settings.seed is None else settings.seed
    for place, token in generator.stream(prompts, ids, settings.max_new_tokens, seed):
        if screen is None:
            continue
        if token is None:
            screen.show(place, streams[place].close())
            screen.finish(place)
        else:
            screen.show(place, streams[place].push(token))
    if is_speaker():
        note(f"generated {generator.timing}")
