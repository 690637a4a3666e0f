"""From a prompt to text: cache, sampling, streaming."""
