"""From text to tokens: sources, documents, splits, the tokenizer, windows of tokens."""
