"""Parts of a training run, each of which can be understood alone; :mod:`dge_recipes.train` puts them together."""
