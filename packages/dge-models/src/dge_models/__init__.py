"""Dynamic Grained Encoder vision transformers on timm.

Importing this package registers its models with timm, so that
``timm.create_model("deit_dge_s124_tiny_patch16_256")`` works.
"""

from importlib.metadata import PackageNotFoundError, version

from dge_models import dge_deit, dge_dpvt, dge_pvt
from dge_models.budget import BudgetLoss, BudgetTerm, cheapest_ratio, mac_ratio
from dge_models.budget_controller import BudgetController
from dge_models.calibration import BudgetSetting, set_budget
from dge_models.canvas import forward_padded
from dge_models.checkpoints import load_checkpoint, read_checkpoint
from dge_models.collecting import CollectedRoutings, RoutingRecord, collect_routings
from dge_models.contact_sheet import contact_sheet, draw_trace
from dge_models.convert import from_timm
from dge_models.dense_copy import dense_copy
from dge_models.detector_padding import PaddingHandle, follow_padding
from dge_models.dge_vit_entry import dge_vit
from dge_models.dpvt import DeformablePyramidVisionTransformer, DGEDeformablePyramidVisionTransformer
from dge_models.draw import draw_granularity, draw_groups, draw_heat_map
from dge_models.encoder import DGEBlock, set_training_mode
from dge_models.eva import DGEEva
from dge_models.export import Agreement, Exported, export_model, time_runs
from dge_models.export_formats import export_format, open_exported
from dge_models.feature_pyramid import SimpleFeaturePyramid
from dge_models.finding import find_routed
from dge_models.fit_routers import RouterFit, fit_routers
from dge_models.fixed_shapes import FixedShapes, fix_shapes
from dge_models.macs import MacCount, count_from_routings, count_macs
from dge_models.merge_tokens import MergeSetting, merge_tokens, set_merge_counts
from dge_models.merged import MergedVisionTransformer, MergedVisionTransformerDistilled
from dge_models.merging_trace import MergingTrace
from dge_models.padding import padded
from dge_models.pvt import DGEPyramidVisionTransformer, PyramidVisionTransformer
from dge_models.random_budget import RandomBudget
from dge_models.routed import RoutedModel
from dge_models.router import Router, deterministic_routing, gumbel_noise
from dge_models.routing import Routing
from dge_models.saving import model_config, push_to_hf_hub, save_pretrained, weights_metadata
from dge_models.segmentation_encoder import SegmentationEncoder
from dge_models.static_queries import FixedQueries, mean_counts, set_dynamic_queries, set_fixed_queries
from dge_models.timing import time_in_turns
from dge_models.trace import RoutingTrace, trace
from dge_models.vit import DGEVisionTransformer, DGEVisionTransformerDistilled

try:
    __version__ = version("dge-models")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Agreement",
    "BudgetController",
    "BudgetLoss",
    "BudgetSetting",
    "BudgetTerm",
    "CollectedRoutings",
    "DGEBlock",
    "DGEDeformablePyramidVisionTransformer",
    "DGEEva",
    "DGEPyramidVisionTransformer",
    "DGEVisionTransformer",
    "DGEVisionTransformerDistilled",
    "DeformablePyramidVisionTransformer",
    "Exported",
    "FixedQueries",
    "FixedShapes",
    "MacCount",
    "MergeSetting",
    "MergedVisionTransformer",
    "MergedVisionTransformerDistilled",
    "MergingTrace",
    "PaddingHandle",
    "PyramidVisionTransformer",
    "RandomBudget",
    "RoutedModel",
    "Router",
    "RouterFit",
    "Routing",
    "RoutingRecord",
    "RoutingTrace",
    "SegmentationEncoder",
    "SimpleFeaturePyramid",
    "__version__",
    "cheapest_ratio",
    "collect_routings",
    "contact_sheet",
    "count_from_routings",
    "count_macs",
    "dense_copy",
    "deterministic_routing",
    "dge_deit",
    "dge_dpvt",
    "dge_pvt",
    "dge_vit",
    "draw_granularity",
    "draw_groups",
    "draw_heat_map",
    "draw_trace",
    "export_format",
    "export_model",
    "find_routed",
    "fit_routers",
    "fix_shapes",
    "follow_padding",
    "forward_padded",
    "from_timm",
    "gumbel_noise",
    "load_checkpoint",
    "mac_ratio",
    "mean_counts",
    "merge_tokens",
    "model_config",
    "open_exported",
    "padded",
    "push_to_hf_hub",
    "read_checkpoint",
    "save_pretrained",
    "set_budget",
    "set_dynamic_queries",
    "set_fixed_queries",
    "set_merge_counts",
    "set_training_mode",
    "time_in_turns",
    "time_runs",
    "trace",
    "weights_metadata",
]
