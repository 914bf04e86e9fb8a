"""Which filters go."""
