"""What is compiled ahead of time is what runs: batches without data look like real ones."""

import jax
import numpy as np
import pytest

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import EmbeddingPlan
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.tasks import blank_run, memory_task, pretrain_task, run_data
from mlpmem_jax.roofline.blank import BlankTokens, abstract_batch


def described(batch):
    return {name: (array.shape, array.dtype) for name, array in batch.items()}


@pytest.mark.parametrize(
    ("make", "section", "inputs"),
    [
        (pretrain_task, "pretrain", "stored"),
        (memory_task, "train", "stored"),
        (memory_task, "train", "online"),
    ],
)
def test_training_batches(tiny_run, make, section, inputs):
    train = tiny_run.train.model_copy(update={"inputs": inputs})
    config = tiny_run.model_copy(update={"train": train})
    mesh = single_device_mesh()
    run = Artifacts(config)
    task = make(run, mesh)
    blank = make(run, mesh, blank=True)
    size = getattr(config, section).batch_size
    with jax.set_mesh(mesh):
        real = next(iter(task.feed(range(1))))
    assert described(abstract_batch(blank.source, size, mesh)) == described(real)
    # Attention goes across documents, and no joint loss reads the decoder's log-probabilities.
    assert not {"segment", "logprob"} & set(real)
    assert blank.flops_per_step == task.flops_per_step
    assert described_tree(blank.frozen) == described_tree(task.frozen)


def test_what_a_task_reads_besides(tiny_run):
    """Segments where attention stays within documents, log-probabilities for a joint loss."""
    corpus = tiny_run.corpus.model_copy(update={"attention": "within"})
    train = tiny_run.train.model_copy(update={"joint_weight": 1.0})
    config = tiny_run.model_copy(update={"corpus": corpus, "train": train})
    length, first = 32, np.zeros(1, np.int64)
    # Stored as configured: what is asked here is which arrays are read.
    stored = Artifacts(tiny_run)
    given = {f"datastore/{split}": stored.datastore(split) for split in ("train", "valid")}
    given |= {f"targets/{split}": stored.targets(split) for split in ("train", "valid")}
    for data in (run_data(Artifacts(config, given=given), "train"), blank_run(Artifacts(config))):
        assert "segment" in data.token_windows("train", length).read(first)
        assert "segment" in data.tokens_with_targets("train", length).read(first)
        assert "logprob" in data.stored_rows("train", length).read(first)


def described_tree(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def test_embedding_batches(tiny_run):
    plan = EmbeddingPlan(1000, 32, 16)
    tokens = TokenSplit.open(Artifacts(tiny_run).tokens, "train")
    real, blank = (plan.read(each, np.arange(4)) for each in (tokens, BlankTokens()))
    assert described(real) == described(blank)
