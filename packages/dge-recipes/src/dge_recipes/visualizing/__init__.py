"""Pictures of where a model spends its queries."""
