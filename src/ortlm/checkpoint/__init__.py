"""A Hugging Face checkpoint: its configuration, its weights (read lazily) and its tokenizer files."""
