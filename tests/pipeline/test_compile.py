"""What is compiled ahead of time is what runs: batches without data look like real ones."""

import jax
import numpy as np
import pytest

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import EmbeddingPlan
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.roofline.blank import BlankRun, BlankTokens, abstract_batch
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.training.memory_training import MemoryTask
from mlpmem_jax.training.pretraining import PretrainTask


def described(batch):
    return {name: (array.shape, array.dtype) for name, array in batch.items()}


@pytest.mark.parametrize(
    ("make", "section", "inputs"),
    [
        (PretrainTask, "pretrain", "stored"),
        (MemoryTask, "train", "stored"),
        (MemoryTask, "train", "online"),
    ],
)
def test_training_batches(tiny_run, make, section, inputs):
    train = tiny_run.train.model_copy(update={"inputs": inputs})
    config = tiny_run.model_copy(update={"train": train})
    mesh = single_device_mesh()
    task = make(config, mesh)
    blank = make(config, mesh, BlankRun(config))
    size = getattr(config, section).batch_size
    with jax.set_mesh(mesh):
        real = next(iter(task.feed(range(1))))
    assert described(abstract_batch(blank.source, size, mesh)) == described(real)
    assert blank.flops_per_step == task.flops_per_step
    assert described_tree(blank.frozen) == described_tree(task.frozen)


def described_tree(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def test_embedding_batches(tiny_run):
    plan = EmbeddingPlan(1000, 32, 16)
    tokens = TokenSplit.open(Layout(tiny_run).tokens, "train")
    real, blank = (plan.read(each, np.arange(4)) for each in (tokens, BlankTokens()))
    assert described(real) == described(blank)
