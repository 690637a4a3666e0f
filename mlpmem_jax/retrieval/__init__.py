"""Neighbours of hidden states, and the next-token distributions that they imply."""
