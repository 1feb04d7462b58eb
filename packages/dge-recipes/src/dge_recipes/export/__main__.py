"""``python -m dge_recipes.export``: the same as ``dge-export``."""

import sys

from dge_recipes.commands.export import main

sys.exit(main())
