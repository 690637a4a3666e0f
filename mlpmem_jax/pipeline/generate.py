"""Prompts to text, with the memory interpolated in every step."""

import sys

from mlpmem_jax.console import is_speaker, note, say
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import check_finished, interpolation
from mlpmem_jax.pipeline.options import Options


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    # Artifacts are checked before a device is touched.
    weight = 0.0 if options.without_memory else interpolation(run)
    if options.dry_run:
        check_finished(run, with_memory=not options.without_memory)
        return execute(lambda _: [], run, options)
    generate(run, weight, with_memory=not options.without_memory)
    return 0


def generate(artifacts: Artifacts, weight: float | None, *, with_memory: bool) -> None:
    """Continues the prompts on the terminal.

    Args:
        weight: λ; None: of the memory's gate.
        with_memory: Whether there is a memory.

    Raises:
        ArtifactError: A network or the tokenizer is missing, damaged, or fits no other.
    """
    from mlpmem_jax.generation.sampling import Sampling
    from mlpmem_jax.generation.stream import Screen
    from mlpmem_jax.pipeline.opened_run import Run
    from mlpmem_jax.pipeline.prompts import prompts_of

    config, run = artifacts.config, Run(artifacts)
    settings = config.generate
    prompts = prompts_of(artifacts, run.tokenizer())
    model = run.model(weight=weight, with_memory=with_memory)
    sampling = Sampling(settings.sampling, settings.temperature, settings.top_k, settings.top_p)
    how = "decoder alone"
    if with_memory:
        how = "λ of the gate" if weight is None else f"λ = {weight:.3f}"
    say(f"sample ({how}, {settings.sampling}):")
    screen = Screen(sys.stdout, prompts) if is_speaker() else None
    seed = config.seed if settings.seed is None else settings.seed
    for place, piece in model.stream(prompts, settings.max_new_tokens, sampling, seed):
        if screen is None:
            continue
        if piece is None:
            screen.finish(place)
        else:
            screen.show(place, piece)
    if is_speaker():
        note(f"generated {model.timing(sampling)}")
