"""How far a built model is from its reference, and what it costs: figures, a report, a gate."""
