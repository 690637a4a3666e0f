"""Artifacts on disk: their layout, their arrays and the manifests that vouch for them."""
