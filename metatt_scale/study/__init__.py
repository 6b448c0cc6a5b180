"""Arms x seeds over a recipe, each a training run in a process of its own, into one table."""
