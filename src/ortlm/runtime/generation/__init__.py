"""The generation loop, token by token or as a stream."""
