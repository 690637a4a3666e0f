"""Where the gains come from, and how sharp the distributions are."""
