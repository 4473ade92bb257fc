"""Constrained decoding: what an answer must look like, and which tokens keep it so."""
