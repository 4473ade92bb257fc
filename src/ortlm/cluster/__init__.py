"""Work on many machines, with Ray: workers, the tasks that they are given, and how a model gets there."""
