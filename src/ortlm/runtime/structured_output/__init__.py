"""Constrained decoding: the form of an answer, and the tokens that keep to it."""
