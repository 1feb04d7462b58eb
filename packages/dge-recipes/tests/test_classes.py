"""Labels meet a model's outputs by the names of the classes."""

import pytest
import torch

from dge_recipes.classes import Classes, match_classes, tell_difference
from dge_recipes.errors import UserError


def _named(*names: str) -> Classes:
    return Classes(len(names), names)


def test_equal_names_change_nothing() -> None:
    match = match_classes(_named("ant", "bee"), _named("ant", "bee"), [0, 1])
    logits, labels = torch.randn(3, 2), torch.tensor([1, 0, -1])
    assert (match.by, match.count, match.outputs) == ("name", 2, None)
    assert all(one is two for one, two in zip(match(logits, labels), (logits, labels), strict=True))


def test_another_order_is_matched() -> None:
    match = match_classes(_named("ant", "bee", "cat"), _named("cat", "ant", "bee"), [0, 1, 2])
    logits, labels = match(torch.tensor([[1.0, 2.0, 7.0]]), torch.tensor([0]))
    assert logits.argmax(1).tolist() == labels.tolist() == [0]
    assert logits.tolist() == [[7.0, 1.0, 2.0]]


def test_a_subset_competes_alone_and_only_if_asked() -> None:
    model, data = _named("ant", "bee", "cat", "dog"), _named("dog", "bee")
    with pytest.raises(UserError, match=r"know ant, bee, cat, dog; .*show dog, bee \(missing: ant, cat\); .*=subset"):
        match_classes(model, data, [0, 1])
    match = match_classes(model, data, [0, 1], subset=True)
    logits, labels = match(torch.tensor([[9.0, 1.0, 8.0, 2.0]]), torch.tensor([0]))
    assert (match.count, logits.tolist(), labels.tolist()) == (2, [[2.0, 1.0]], [0])


def test_of_a_subset_those_that_occur() -> None:
    names = _named("ant", "bee", "cat")
    assert match_classes(names, names, [0, 2]).count == 3  # nothing was asked for
    match = match_classes(names, names, [0, 2], subset=True)
    logits, labels = match(torch.tensor([[1.0, 9.0, 2.0]] * 3), torch.tensor([2, 0, -1]))
    assert (match.outputs, logits.tolist()[0], labels.tolist()) == ((0, 2), [1.0, 2.0], [1, 0, -1])
    assert match_classes(names, names, [0, 1, 2], subset=True).outputs is None


@pytest.mark.parametrize("subset", [False, True])
def test_unknown_classes_are_an_error(subset: bool) -> None:
    with pytest.raises(UserError, match=r"know ant, bee; .*show bee, cat \(missing: ant; unknown: cat\)$"):
        match_classes(_named("ant", "bee"), _named("bee", "cat"), [0, 1], subset=subset)
    with pytest.raises(UserError, match=r"show ant, bee, cat \(unknown: cat\)$"):
        match_classes(_named("ant", "bee"), _named("ant", "bee", "cat"), [0, 1, 2], subset=subset)


def test_numbers_where_there_are_no_names() -> None:
    named = _named("ant", "bee")
    for model, data in ((Classes(2), named), (named, Classes(2)), (Classes(2), Classes(2))):
        assert match_classes(model, data, [0, 1]).by == "number"
    with pytest.raises(UserError, match=r"know 3 classes without names; the images show 2 classes \(ant, bee\)$"):
        match_classes(Classes(3), named, [0, 1])
    with pytest.raises(UserError, match=r"2 classes \(ant, bee\); the images show 5 classes .*data.num_classes says"):
        match_classes(named, Classes(5), [4])
    with pytest.raises(UserError, match="finds classes by their names, but the weights know 3 without names"):
        match_classes(Classes(3), named, [0, 1], subset=True)


def test_a_subset_of_numbers() -> None:
    match = match_classes(_named("ant", "bee", "cat"), Classes(3), [1, 2], subset=True)
    assert (match.by, match.outputs, match.places) == ("number", (1, 2), (-1, 0, 1))
    assert match_classes(Classes(9), Classes(3), [0, 2], subset=True).outputs == (0, 2)
    with pytest.raises(UserError, match="know 2 classes"):
        match_classes(Classes(2), Classes(3), [0, 2], subset=True)


def test_imagenets_classes_are_known_by_their_synsets() -> None:
    match = match_classes(Classes(1000), _named("n01443537", "n01440764"), [0, 1], subset=True)
    assert (match.by, match.outputs) == ("name", (1, 0))
    with pytest.raises(UserError, match="by their names, but the weights know 1000 without"):
        match_classes(Classes(1000), _named("n01443537", "goldfish"), [0, 1], subset=True)


def test_one_name_for_two_classes_tells_nothing() -> None:
    twice = _named("crane", "crane", "bee")
    assert match_classes(twice, twice, [0, 1, 2]).outputs is None
    with pytest.raises(UserError, match="the images show two classes called crane"):
        match_classes(_named("bee", "crane", "owl"), _named("bee", "crane", "crane"), [0, 1, 2], subset=True)


def test_spellings_of_unicode_are_one() -> None:
    assert match_classes(_named("caf\u00e9", "x"), _named("cafe\u0301", "x"), [0, 1]).outputs is None


def test_long_lists_are_cut_and_odd_names_quoted() -> None:
    many = [f"class_{number}" for number in range(1000)]
    told = tell_difference("the weights know", many, "the images show", [*many[1:], "disc, stripes"])
    assert "know class_0, class_1, class_2, class_3, class_4 and 995 more;" in told
    assert told.endswith("(missing: class_0; unknown: 'disc, stripes')")
    told = tell_difference("were", ["a", "b", "c"], "are", ["a", "c", "b"])
    assert told == "were a, b, c; are a, c, b (in another order: number 1 is b and c)"
