"""A model's weights: read by the names of its spec, written where a plan puts them."""
