"""Ahead-of-time compilation: does a step fit its devices, and what bounds it."""
