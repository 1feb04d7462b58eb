"""The README of a saved model: what it is and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import Block
from torch import nn

from dge_models.budget import cheapest_ratio
from dge_models.routed import routed_blocks
from dge_models.static_queries import empty_routings, mac_ratio_of, set_dynamic_queries

__all__ = ["model_card"]

_CARD = """---
tags:
- image-classification
- timm
- dge
pipeline_tag: image-classification
library_name: timm
license: {license}
---
# {title}

{facts}

## Load it

```python
import dge_models  # registers {architecture} with timm
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # of a hub page: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))
```

`dge_models.set_budget` gives it another share of its MACs, without training.
"""


_OF = "with every query computed"


def model_card(model: Any, twin: Any, config: Mapping[str, Any], ratio: float | None = None) -> str:
    """A model card to go on with.

    Args:
        model: What is saved.
        twin: The same without weights, on the meta device.
        config: What its config.json holds.
        ratio: A mean MAC ratio that was measured.
    """
    arguments = config["model_args"]
    base = arguments.get("base", config["architecture"])
    facts = [f"- Plain model: `{base}`" if "base" in arguments else f"- Registered name: `{base}`"]
    _, rows, cols = config["pretrained_cfg"]["input_size"]
    size = tuple(arguments.get("fixed_image_size", (rows, cols)))
    facts += _routing_facts(model, twin, size, ratio)
    facts.append(f"- Images: {rows} × {cols} pixels; classes: {config['num_classes']}")
    if arguments.keys() & {"merge_thresholds", "merge_counts"}:
        facts += _merging_facts(arguments, ratio)
    title = f"{base} with Dynamic Grained Encoder blocks" if routed_blocks(model) else base
    title = f"{base} that merges tokens" if arguments.keys() & {"merge_thresholds", "merge_counts"} else title
    return _CARD.format(
        license=config["pretrained_cfg"].get("license", "other"),
        title=title,
        facts="\n".join(facts),
        architecture=config["architecture"],
    )


def _merging_facts(arguments: Mapping[str, Any], ratio: float | None) -> list[str]:
    if "merge_counts" in arguments:
        facts = [f"- Merges tokens, per block and image: {', '.join(map(str, arguments['merge_counts']))}"]
    else:
        facts = ["- Merges tokens that are similar enough, as many as each image allows"]
    return facts if ratio is None else [*facts, f"- MAC ratio, measured: {ratio:.3f} of the MACs with every token"]


def _routing_facts(model: nn.Module, twin: nn.Module, size: tuple[int, int], ratio: float | None) -> list[str]:
    routed = routed_blocks(model)
    if not routed:
        return []
    facts = [f"- Splits (queries per region side): {', '.join(map(str, routed[0].router.splits))}"]
    layers = sum(isinstance(module, Block) for module in model.modules())
    facts.append(f"- Routed blocks: {len(routed)} of {layers}")
    if ratio is not None:
        facts.append(f"- MAC ratio, measured: {ratio:.3f} of the MACs {_OF}")
    set_dynamic_queries(twin)
    routings = empty_routings(twin, size)
    layouts = [block.fixed_layout for block in routed]
    queries = [layout.num_queries for layout in layouts if layout is not None]
    if len(queries) == len(routed):
        fixed = mac_ratio_of(twin, routings, queries)
        facts.append(f"- Fixed queries: every image takes {fixed:.3f} of the MACs {_OF}")
    else:
        cheapest = cheapest_ratio(twin, routings)
        facts.append(f"- Dynamic queries: an image takes from {cheapest:.3f} to 1 of the MACs {_OF}")
    return facts
