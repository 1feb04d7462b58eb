"""Settings that make a recipe small, and a clean Accelerate; the tests of examples and benchmarks use them too."""

from accelerate.state import AcceleratorState, GradientState, PartialState

__all__ = ["SMALL", "forget_accelerate"]

# 8 x 8 tokens, one block: a training step takes milliseconds.
SMALL = (
    "data.image_size=32",
    "data.digit_size=20",
    "model.kwargs.img_size=32",
    "model.kwargs.embed_dim=16",
    "model.kwargs.num_heads=2",
    "model.kwargs.depth=1",
    "train.epochs=2",
    "train.batch_size=240",
    "train.log_every=2",
    "train.eval_every=1",
    "checkpoint.every_epochs=1",
    "eval.batch_size=100",
    "eval.timing_rounds=0",
)


def forget_accelerate() -> None:
    """Drop the state that Accelerate keeps in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
