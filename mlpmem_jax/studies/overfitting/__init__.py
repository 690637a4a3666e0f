"""The command `overfitting`."""
