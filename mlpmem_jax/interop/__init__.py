"""Pretrained models of other software: what their files hold, as networks of this package."""
