"""Real models as pure functions of their params, each one file."""
