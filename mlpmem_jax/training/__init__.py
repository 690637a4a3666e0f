"""Training: losses, optimiser, state, checkpoints, metrics and the one loop."""
