"""Real weights and real photographs, to measure on what models do that nobody trains again."""
