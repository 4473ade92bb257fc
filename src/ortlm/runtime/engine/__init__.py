"""A graph that runs: session, KV cache, decode loop, adapters and prompt caches."""
