"""Many requests at once on one loaded model: continuous batching, see ``engine``."""
