"""Tokenizers from the files that publishers ship: which tokens are special, their cost, how to open them."""
