"""Text in and out: chat templates."""
