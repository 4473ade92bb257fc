"""Which numbers stand for a weight: schemes, algorithms, recipes and the layout of their bytes."""
