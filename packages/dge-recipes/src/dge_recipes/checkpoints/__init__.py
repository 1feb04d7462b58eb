"""Checkpoints that survive a crash: written aside, checksummed, renamed into place."""

from dge_recipes.checkpoints.store import CheckpointStore, run_config, weights_file
from dge_recipes.checkpoints.training_state import capture_state, read_progress, restore_state

__all__ = ["CheckpointStore", "capture_state", "read_progress", "restore_state", "run_config", "weights_file"]
