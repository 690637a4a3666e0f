"""The decoder over windows of the corpus: its states, stored or compared."""
