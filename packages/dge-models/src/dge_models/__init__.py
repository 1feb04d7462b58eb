"""Dynamic Grained Encoder vision transformers on timm.

Importing this package registers its models with timm, so that
``timm.create_model("deit_dge_s124_tiny_patch16_256")`` works.
"""

from dge_models import dge_deit
from dge_models.budget import BudgetLoss, mac_ratio
from dge_models.checkpoints import load_checkpoint, read_checkpoint
from dge_models.convert import from_timm
from dge_models.draw import draw_granularity, draw_heat_map
from dge_models.encoder import DGEBlock, set_training_mode
from dge_models.macs import MacCount, count_macs
from dge_models.router import Router, deterministic_routing, gumbel_noise
from dge_models.routing import Routing
from dge_models.sheet import contact_sheet, draw_trace
from dge_models.trace import RoutingTrace, trace
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled

__all__ = [
    "BudgetLoss",
    "DGEBlock",
    "DGEVisionTransformer",
    "DGEVisionTransformerDistilled",
    "MacCount",
    "Router",
    "Routing",
    "RoutingTrace",
    "contact_sheet",
    "count_macs",
    "deterministic_routing",
    "dge_deit",
    "draw_granularity",
    "draw_heat_map",
    "draw_trace",
    "from_timm",
    "gumbel_noise",
    "load_checkpoint",
    "mac_ratio",
    "read_checkpoint",
    "set_training_mode",
    "trace",
]
