"""The graph of stages, and the commands that run them."""
