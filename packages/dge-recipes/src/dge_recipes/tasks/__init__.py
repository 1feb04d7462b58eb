"""What can be learnt. Everything that only one task knows is in its file; the rest asks :class:`Task`."""

from dge_recipes.config import Config
from dge_recipes.tasks.task import Task, TaskEvaluation

__all__ = ["Task", "TaskEvaluation", "task_of"]


def task_of(config: Config) -> Task:
    """The task of a recipe."""
    # Imported late: each task has its own libraries, which the others do without.
    if config.task == "detection":
        from dge_recipes.tasks.detection import Detection

        return Detection(masks=config.head.kind == "mask_rcnn")
    if config.task == "segmentation":
        from dge_recipes.tasks.segmentation import Segmentation

        return Segmentation()
    if config.task == "distillation":
        from dge_recipes.tasks.distillation import Distillation

        return Distillation(config)
    from dge_recipes.tasks.classification import Classification

    return Classification()
