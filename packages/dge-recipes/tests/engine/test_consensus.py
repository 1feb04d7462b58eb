"""Which of several reasons to halt counts."""

from accelerate import Accelerator

from dge_recipes.engine.consensus import Agreement, Halt


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = Agreement(Accelerator(cpu=True))
    for halt in Halt:
        assert agreement.share(halt) is halt
        assert agreement.settle(halt) is halt
    assert max(Halt) is Halt.BAD_NUMBER
