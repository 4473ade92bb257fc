"""The chat page: its files (``static/``), Markdown as safe HTML, and what it shows of a model."""
