"""``python -m dge_recipes.compress``: the same as ``dge-compress``."""

import sys

from dge_recipes.commands.compress import main

sys.exit(main())
