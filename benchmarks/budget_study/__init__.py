"""The study: what budgets cost and save on real data within a CPU's reach, over several seeds."""
