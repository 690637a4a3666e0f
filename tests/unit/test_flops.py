"""Formulas of flops and parameters against what XLA and the networks say."""

import jax
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.stages import TrainConfig
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.compiled_steps import lower_step
from mlpmem_jax.pipeline.estimates import training_estimate
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.tasks import joint_task, memory_task
from mlpmem_jax.roofline.blank import abstract_batch
from mlpmem_jax.training import flops
from mlpmem_jax.training.loop import assemble
from mlpmem_jax.training.step import waiting_groups

VOCAB, LENGTH = 1000, 64
LLAMA = DecoderConfig(width=256, num_layers=2, num_kv_heads=2, layer_loop="unroll", attention="xla")
GPT2 = LLAMA.model_copy(
    update={
        "norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all",
        "head": "tied", "num_kv_heads": "auto",
    }
)  # fmt: skip
FAMILIES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def compiled_flops(function, model, *shapes):
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return compiled.lower(state, *abstract).compile().cost_analysis()["flops"]


@FAMILIES
def test_decoder_flops_agree_with_xla(config):
    decoder = Decoder(config, VOCAB, rngs=nnx.Rngs(0))

    def forward(model, tokens_BL):
        return model.logits(model.hidden(tokens_BL)[0])

    counted = compiled_flops(forward, decoder, ((2, LENGTH), "int32"))
    formula = flops.decoder_flops_per_token(config, VOCAB, LENGTH, attention="full")
    assert counted == pytest.approx(2 * LENGTH * formula, rel=0.05)


@pytest.mark.parametrize("block", ["swiglu", "gelu"])
def test_memory_flops_agree_with_xla(block):
    config = MemoryConfig(width=192, num_layers=2, block=block, layer_loop="unroll")
    memory = Memory(config, 128, VOCAB, rngs=nnx.Rngs(0))

    def forward(model, input_ND):
        return model.logits(model.hidden(input_ND))

    counted = compiled_flops(forward, memory, ((256, 128), "float32"))
    formula = flops.memory_flops_per_token(config, 128, VOCAB)
    assert counted == pytest.approx(256 * formula, rel=0.05)


# Blocks are written out and there is one chunk of the loss, since XLA counts a loop's body
# once. With 2048 tokens a step, what is done once a parameter (AdamW, clipping, the norms of the
# metrics: some 25 operations, none counted) is 0.2 % of the 6 · 2048 for it.
TOKENS = 2048
STEP = (
    f"tokenizer.vocab_size={VOCAB}", f"decoder.context_tokens={LENGTH}", "decoder.width=256",
    "decoder.num_layers=2", "decoder.num_heads=4", "memory.num_layers=2", "targets.num_tokens=8",
    "decoder.attention=xla", "decoder.layer_loop=unroll", "memory.layer_loop=unroll",
    "decoder.remat=none", "memory.remat=none", f"datastore.chunk_rows={LENGTH}",
    f"pretrain.batch_size={TOKENS // LENGTH}", f"pretrain.loss_chunk_tokens={TOKENS}",
    f"train.batch_size={TOKENS // LENGTH}", f"train.loss_chunk_tokens={TOKENS}",
    "train.decoder_optimizer.warmup_steps=2",
)  # fmt: skip
GPT2_KEYS = (
    "decoder.norm=layer", "decoder.positions=learned", "decoder.activation=gelu",
    "decoder.biases=all", "decoder.head=tied",
)  # fmt: skip
JOINT = ("train.mode=joint", "memory.width=192", "memory.gate=learned", "decoder.num_kv_heads=2")
ONLINE = ("train.inputs=online", "memory.width=256")


def check_step(config, attention_passes):
    """Compares a task's flops with XLA's count of its whole step, optimiser and all.

    A task charges a query for the keys that it may see, XLA's dense attention multiplies with
    all: `attention_passes` times the difference, in passes through all blocks, is added.
    """
    step = lower_step(Artifacts(config), single_device_mesh())
    counted = step.lowered.compile().cost_analysis()["flops"]
    full, half = (
        flops.decoder_flops_per_token(config.decoder, VOCAB, LENGTH, attention=attention)
        for attention in ("full", "half")
    )
    assert step.num_tokens == TOKENS
    unseen = attention_passes * TOKENS * (full - half)
    assert counted == pytest.approx(step.model_flops + unseen, rel=0.05)


@pytest.mark.parametrize(
    "family",
    [("decoder.num_kv_heads=2",), GPT2_KEYS, ("decoder.ngram_orders=[2,3]",)],
    ids=["llama", "gpt2", "ngrams"],
)
def test_flops_of_a_pretraining_step_agree_with_xla(make_config, family):
    check_step(make_config(*STEP, *family, "compile.step=pretrain"), 3)


@pytest.mark.parametrize(
    ("keys", "attention_passes"),
    [
        (("memory.width=192",), 0),
        (("memory.width=256", "memory.block=gelu"), 0),
        # Embeddings are looked up; what they go through is a wider projection.
        (("memory.width=192", "memory.recent_tokens=3"), 0),
        (("memory.width=192", "memory.recent_tokens=3", "memory.recent_table=own"), 0),
        (("memory.width=192", "memory.ngram_orders=[2,3]", "memory.recent_tokens=0"), 0),
        # The head is the decoder's, which is frozen.
        (("memory.width=256", "memory.head=tied"), 0),
        (("memory.width=192", "train.joint_weight=0.5"), 0),
        # The decoder runs up to what the last feed-forward reads; its first block alone.
        ((*ONLINE, "datastore.input.layer=2"), 1),
        ((*ONLINE, "datastore.input.layer=1", "datastore.input.site=residual"), 1 / 2),
        (JOINT, 3),
    ],
    ids=[
        "memory",
        "gelu",
        "recent",
        "own-table",
        "ngrams",
        "tied",
        "mixture",
        "online",
        "residual",
        "joint",
    ],
)
def test_flops_of_a_training_step_agree_with_xla(make_config, keys, attention_passes):
    check_step(make_config(*STEP, *keys, "compile.step=train"), attention_passes)


def test_parts_of_the_decoder():
    """Causal attention costs half of the full one; blocks and head are counted apart."""

    def count(**keys):
        return flops.decoder_flops_per_token(LLAMA, VOCAB, LENGTH, **keys)

    mixing = 4 * LLAMA.num_layers * LLAMA.width
    assert count(attention="full") - count() == mixing * (LENGTH - 1) / 2
    assert count() - count(head=False) == 2 * 256 * 1024
    assert count(num_layers=1, head=False) == count(head=False) / 2
    # Queries see 1 … L keys; with a sliding window of 50 never more than 50.
    windowed = LLAMA.model_copy(update={"sliding_window": 50})
    fewer = sum(max(0, query + 1 - 50) for query in range(LENGTH)) / LENGTH
    assert count() - flops.decoder_flops_per_token(windowed, VOCAB, LENGTH) == mixing * fewer
    hidden = 3 * 256 * 704
    assert count() - count(last_ffn=False) == 2 * hidden


@FAMILIES
def test_decoder_parameters(config):
    decoder = Decoder(config, VOCAB, rngs=nnx.Rngs(0))
    total = sum(x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
    tables = 2 * 1024 * 256 if config.head == "untied" else 1024 * 256 + 256 * 256
    assert flops.decoder_parameters(config, VOCAB) == {
        "total": total,
        "non_embedding": total - tables,
    }


def test_memory_parameters():
    config = MemoryConfig(width=32, num_layers=2, ffn_width=64)
    counted = flops.memory_parameters(config, 16, 100)
    blocks = 2 * (3 * 32 * 64 + 32)
    assert counted == {"total": blocks + 32 + 16 * 32 + 128 * 32, "non_embedding": blocks + 544}


def test_gpt2_has_its_known_size():
    """GPT-2 small: 124 M parameters (50257 padded to 50304)."""
    config = GPT2.model_copy(
        update={"width": 768, "num_layers": 12, "num_heads": 12, "context_tokens": 1024}
    )
    padding = (50304 - 50257) * 768
    assert flops.decoder_parameters(config, 50257)["total"] - padding == 124_439_808


def test_peak_of_this_machine():
    assert flops.peak_flops(jax.devices("cpu")[0]) > 1e8


def test_the_peak_of_a_cpu_is_the_best_that_was_measured(monkeypatch):
    measured = iter([3e9, 1e9, 5e9])
    monkeypatch.setattr(flops, "_cpu_peak", 0.0)
    monkeypatch.setattr(flops, "measure_cpu_flops", lambda: next(measured))
    device = jax.devices("cpu")[0]
    peaks = [flops.peak_flops(device) * jax.local_device_count("cpu") for _ in range(3)]
    assert peaks == [3e9, 3e9, 5e9]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("?", None)],
)
def test_peaks_by_kind(kind, peak):
    class Device:
        platform, device_kind = "accelerator", kind

    assert flops.peak_flops(Device()) == peak


def _by_hand(train: TrainConfig, decoder: float, memory: float, steps: range) -> float:
    """One step after another: forward, gradient of weights, gradient of what was read."""
    total = 0.0
    for step in steps:
        decoder_moves = step >= train.decoder_freeze_steps
        memory_moves = step >= train.memory_freeze_steps
        total += decoder * (3 if decoder_moves else 1) + memory
        total += memory * memory_moves
        total += memory * (memory_moves or (decoder_moves and train.decoder_gradient > 0))
    return total


@pytest.mark.parametrize("gradient", [0.0, 0.5])
@pytest.mark.parametrize("freezes", [(0, 0), (3, 0), (0, 4), (5, 2), (20, 0), (2, 2)])
@pytest.mark.parametrize("steps", [range(10), range(3, 7), range(6, 6)])
def test_what_is_frozen_is_charged_what_is_computed(gradient, freezes, steps):
    train = TrainConfig(
        mode="joint",
        decoder_gradient=gradient,
        decoder_freeze_steps=freezes[0],
        memory_freeze_steps=freezes[1],
    )
    found = flops.joint_training_flops_per_token(train, 7.0, 2.0, steps)
    assert found == _by_hand(train, 7.0, 2.0, steps)
    if freezes == (0, 0):
        assert found == 3 * (7.0 + 2.0) * len(steps)


@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("keys", [(), ("train.decoder_gradient=0",), ("train.mode=memory",)])
def test_estimates_are_what_is_charged(make_config, keys, head):
    shape = ("memory.head=tied", "memory.width=256") if head == "tied" else ()
    gate = ("memory.gate=none",) if "train.mode=memory" in keys else ()
    config = make_config(*STEP, *JOINT, "train.decoder_freeze_steps=4", *keys, *gate, *shape)
    make = joint_task if config.train.mode == "joint" else memory_task
    run = Artifacts(config)
    task = make(run, single_device_mesh(), blank=True)
    charged = task.flops_of(range(config.train.num_steps))
    assert training_estimate(run)["model flops"] == pytest.approx(charged)


@pytest.mark.parametrize("gradient", ["1.0", "0.0"])
@pytest.mark.parametrize("waiting", ["decoder", "memory"])
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_flops_of_a_step_in_which_a_network_waits_agree_with_xla(
    make_config, waiting, gradient, head
):
    keys = (f"train.{waiting}_freeze_steps=5", f"train.decoder_gradient={gradient}")
    keys += ("memory.recent_tokens=8",)  # So wide an input that its gradient is seen.
    shape = ("memory.head=tied", "memory.width=256") if head == "tied" else ()
    config = make_config(*STEP, *JOINT, *keys, *shape)
    mesh = single_device_mesh()
    task = joint_task(Artifacts(config), mesh, blank=True)
    with jax.set_mesh(mesh):
        blueprint, step = assemble(task, config.train, seed=0, mesh=mesh)
        batch = abstract_batch(task.source, config.train.batch_size, mesh)
        groups = waiting_groups(config.train, 0)
        assert groups == {waiting}
        lowered = step.lower(blueprint.abstract(), task.frozen, batch, waiting=groups)
    counted = lowered.compile().cost_analysis()["flops"]
    full, half = (
        flops.decoder_flops_per_token(config.decoder, VOCAB, LENGTH, attention=attention)
        for attention in ("full", "half")
    )
    unseen = (1 if waiting == "decoder" else 3) * TOKENS * (full - half)
    assert counted == pytest.approx(task.flops_of(range(1)) + unseen, rel=0.05)
    assert task.flops_of(range(1)) < 0.9 * task.flops_of(range(6, 7))
