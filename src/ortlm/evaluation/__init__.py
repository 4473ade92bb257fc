"""How far a built model is from its reference, and what it needs: figures, a report, a quality threshold."""
