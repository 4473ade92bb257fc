"""From an artifact to text; knows nothing of how artifacts are made."""
