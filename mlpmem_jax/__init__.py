"""mlpmem_jax: pretraining of language models with an MLP Memory, in JAX and Flax NNX."""

__version__ = "0.1.0"
