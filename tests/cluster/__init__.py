"""Tests with a local cluster of Ray, which `make test-ray` runs; elsewhere they are left out."""
