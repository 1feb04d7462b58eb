"""The arguments of a model that timm saves with it, as they are when it is saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from dge_models.routing_arguments import ENTRY, ROUTING_ARGUMENTS, routing_arguments

__all__ = ["RecordedArguments", "record_base"]


class RecordedArguments(nn.Module):
    """A model whose recorded arguments say how it routes or merges now."""

    @property
    def _model_args(self) -> dict[str, Any]:
        """Where timm looks for the arguments that it saves with a model."""
        recorded = {k: v for k, v in self.__dict__.get("_model_args", {}).items() if k not in ROUTING_ARGUMENTS}
        if self.__dict__.get("pretrained_cfg", {}).get("architecture") == ENTRY:
            recorded = {"base": self.__dict__.get("base_architecture"), **recorded}
        return {**recorded, **routing_arguments(self)}

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        self.__dict__["_model_args"] = dict(arguments)


def record_base(converted: Any) -> None:
    """Say what a copy was made from, where timm knows the plain model's name, so that it can be saved.

    Args:
        converted: A routed or merging model, with the configuration of the plain one.
    """
    config = getattr(converted, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    if isinstance(config, dict) and name is not None:
        converted.base_architecture = name
        converted.pretrained_cfg = converted.default_cfg = {**config, "architecture": ENTRY}
