"""Dynamic Grained Encoder vision transformers on timm.

Importing this package registers its models with timm, so that
``timm.create_model("deit_dge_s124_tiny_patch16_256")`` works.
"""

from dge_models import dge_deit, dge_pvt
from dge_models.budget import BudgetLoss, BudgetTerm, cheapest_ratio, mac_ratio
from dge_models.budget_controller import BudgetController
from dge_models.calibration import BudgetSetting, set_budget
from dge_models.checkpoints import load_checkpoint, read_checkpoint
from dge_models.convert import from_timm
from dge_models.draw import draw_granularity, draw_heat_map
from dge_models.encoder import DGEBlock, set_training_mode
from dge_models.fixed_shape import FixedQueries, mean_counts, set_dynamic_queries, set_fixed_queries
from dge_models.macs import MacCount, count_macs
from dge_models.pvt import DGEPyramidVisionTransformer, PyramidVisionTransformer
from dge_models.random_budget import RandomBudget
from dge_models.routed import RoutedModel
from dge_models.router import Router, deterministic_routing, gumbel_noise
from dge_models.routing import Routing
from dge_models.sheet import contact_sheet, draw_trace
from dge_models.trace import RoutingTrace, trace
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled

__all__ = [
    "BudgetController",
    "BudgetLoss",
    "BudgetSetting",
    "BudgetTerm",
    "DGEBlock",
    "DGEPyramidVisionTransformer",
    "DGEVisionTransformer",
    "DGEVisionTransformerDistilled",
    "FixedQueries",
    "MacCount",
    "PyramidVisionTransformer",
    "RandomBudget",
    "RoutedModel",
    "Router",
    "Routing",
    "RoutingTrace",
    "cheapest_ratio",
    "contact_sheet",
    "count_macs",
    "deterministic_routing",
    "dge_deit",
    "dge_pvt",
    "draw_granularity",
    "draw_heat_map",
    "draw_trace",
    "from_timm",
    "gumbel_noise",
    "load_checkpoint",
    "mac_ratio",
    "mean_counts",
    "read_checkpoint",
    "set_budget",
    "set_dynamic_queries",
    "set_fixed_queries",
    "set_training_mode",
    "trace",
]
