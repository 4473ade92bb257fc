"""Images in prompts: where they come from."""
