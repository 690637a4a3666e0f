"""Input of training: windows of tokens and rows, in an order that seed and step decide."""
