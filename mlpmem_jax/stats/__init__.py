"""Numbers on plain arrays: the bootstrap, and the best weight of a mixture."""
