"""Cost, and quality, while the datastore grows."""
