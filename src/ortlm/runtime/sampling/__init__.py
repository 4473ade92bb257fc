"""From logits to tokens: settings, logits processors, samplers and beam search."""
