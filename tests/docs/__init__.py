"""Runs what the pages say: README.md and docs/."""
