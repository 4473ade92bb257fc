"""OpenAI's HTTP API, and Anthropic's messages, over ``ortlm.serving``. Needs the extra ``ortlm[serve]``."""
