"""From a checkpoint to an artifact: what was asked for, what will be written, and writing it."""
