"""Studies of several runs, a folder for each command; `tables` is what three of them share."""
