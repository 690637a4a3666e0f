"""The steps that can be compiled: those of the pipeline, on shapes instead of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mlpmem_jax.config.compile import Step
from mlpmem_jax.corpus.windows import EmbeddingPlan
from mlpmem_jax.embedding.embed import dtypes_of, make_embed_step
from mlpmem_jax.generation.decode import STEPS_PER_CALL, Generator
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.parallel.mesh import check_batch
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.settings import embedding_settings
from mlpmem_jax.pipeline.tasks import blank_run, joint_task, memory_task, pretrain_task
from mlpmem_jax.roofline.analysis import LoweredStep
from mlpmem_jax.roofline.blank import BlankTokens, abstract_batch
from mlpmem_jax.store.array_specs import datastore_arrays
from mlpmem_jax.training.flops import decoder_flops_per_token, memory_flops_per_token
from mlpmem_jax.training.loop import assemble
from mlpmem_jax.training.task import WindowTask


def lower_step(run: Artifacts, mesh: jax.sharding.Mesh) -> LoweredStep:
    """Lowers the step that `compile.step` names, on a mesh whose devices need not exist.

    Raises:
        ConfigError: Its batch does not fit the mesh.
    """
    makers: dict[Step, Callable[[Artifacts, jax.sharding.Mesh], LoweredStep]] = {
        "pretrain": _pretrain,
        "train": _train,
        "embed": _embed,
        "decode": _decode,
    }
    with jax.set_mesh(mesh):
        return makers[run.config.compile.step](run, mesh)


def _pretrain(run: Artifacts, mesh: jax.sharding.Mesh) -> LoweredStep:
    return _training(run, mesh, "pretrain", pretrain_task(run, mesh, blank=True))


def _train(run: Artifacts, mesh: jax.sharding.Mesh) -> LoweredStep:
    make = joint_task if run.config.train.mode == "joint" else memory_task
    return _training(run, mesh, "train", make(run, mesh, blank=True))


def _training(
    run: Artifacts, mesh: jax.sharding.Mesh, section: str, task: WindowTask
) -> LoweredStep:
    settings = getattr(run.config, section)
    size = settings.batch_size
    check_batch(mesh, f"{section}.batch_size", size, settings.accumulation_steps)
    blueprint, step = assemble(task, settings, seed=run.config.seed, mesh=mesh)
    batch: Batch = abstract_batch(task.source, size, mesh)  # type: ignore[assignment]
    state = blueprint.abstract()
    lowered = step.lower(state, task.frozen, batch)  # type: ignore[attr-defined]
    arguments = {"state": state, "frozen": task.frozen, "batch": batch}
    return LoweredStep(lowered, arguments, task.flops_per_step, task.tokens_per_step)


def _embed(run: Artifacts, mesh: jax.sharding.Mesh) -> LoweredStep:
    config = run.config
    size = config.datastore.batch_size
    check_batch(mesh, "datastore.batch_size", size)
    blank, specs = blank_run(run), datastore_arrays(config.datastore, config.decoder.width)
    settings = embedding_settings(config, specs)
    window, stride = settings.window_tokens, settings.stride_tokens
    plan = EmbeddingPlan(1 << 40, window, stride, settings.within)
    step = make_embed_step(blank.decoder(mesh), settings, dtypes_of(specs))
    batch = abstract_batch(_PlannedWindows(plan), size, mesh)
    blocks = decoder_flops_per_token(config.decoder, blank.vocab_size, window, head=False)
    head = decoder_flops_per_token(config.decoder, blank.vocab_size, window) - blocks
    jitted: Any = step.func
    return LoweredStep(
        jitted.lower(*step.args, batch),
        {"decoder": step.args[0], "batch": batch},
        model_flops=size * (window * blocks + stride * head),
        num_tokens=size * stride,
    )


class _PlannedWindows:
    """Blank windows as the embedding reads them."""

    num_windows = 1

    def __init__(self, plan: EmbeddingPlan):
        self._plan = plan

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        return self._plan.read(BlankTokens(), windows)


def _decode(run: Artifacts, mesh: jax.sharding.Mesh) -> LoweredStep:
    config, blank = run.config, blank_run(run)
    site = Site.of(config.datastore.input, config.decoder.num_layers)
    model = InterpolatedModel(
        blank.decoder(mesh), blank.memory(mesh), site=site, weight=0.5, separator=0, mesh=mesh
    )
    settings = config.generate
    sampling = Sampling(settings.sampling, settings.temperature, settings.top_k, settings.top_p)
    generator = Generator(model, sampling)
    prompts, context = config.compile.num_prompts, config.decoder.context_tokens
    # Attention reads the whole cache, full or not.
    per_token = decoder_flops_per_token(
        config.decoder, blank.vocab_size, context, attention="full"
    ) + memory_flops_per_token(config.memory, config.decoder.width, blank.vocab_size)
    jitted, arguments = generator.abstract_steps(prompts)
    return LoweredStep(
        jitted.lower(*arguments),
        {"networks": arguments[0][:2], "progress": arguments[1]},
        model_flops=prompts * STEPS_PER_CALL * per_token,
        num_tokens=prompts * STEPS_PER_CALL,
        inner_trips=STEPS_PER_CALL,
    )
