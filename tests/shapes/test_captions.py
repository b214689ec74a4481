import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbp_ray.shapes import captions
from flowbp_ray.shapes.captions import TASKS
from flowbp_ray.shapes.world import RELATIONS, Noun, Spec

EVERY_SPEC = [(task, spec) for task in TASKS for spec in captions.specs(task)]


def test_every_wording_of_every_spec_reads_back():
    for task, spec in EVERY_SPEC:
        assert captions.task_of(spec) == task
        for text in captions.wordings(spec):
            assert captions.parse(text) == spec, text


def test_every_wording_has_one_spec_only():
    texts = [text for _, spec in EVERY_SPEC for text in captions.wordings(spec)]
    assert len(texts) == len(set(texts))


def test_training_and_evaluation_prompts_do_not_overlap():
    for task in TASKS:
        training, evaluation = (set(captions.prompts(task, side)) for side in ("training", "evaluation"))
        assert training
        assert evaluation
        assert not training & evaluation
        assert len(evaluation) / len(training | evaluation) == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize("task", ["two_objects", "position", "attribute_binding"])
def test_contents_with_two_nouns_are_held_out_in_every_wording(task):
    training, evaluation = ({captions.parse(t) for t in captions.prompts(task, side)} for side in ("training", "evaluation"))
    assert not training & evaluation


def test_swapped_nouns_of_two_objects_are_on_one_side():
    evaluation = {captions.parse(t) for t in captions.prompts("two_objects", "evaluation")}
    assert all(Spec(spec.nouns[::-1]) in evaluation for spec in evaluation)


def test_evaluation_prompts_use_each_prompt_once_before_any_twice_and_grow_by_appending():
    many, few = captions.evaluation_prompts(200), captions.evaluation_prompts(10)
    for task in TASKS:
        pool = captions.prompts(task, "evaluation")
        assert len(many[task]) == 200
        assert many[task][:10] == few[task]
        first = many[task][: len(pool)]
        assert len(set(first)) == len(first)


@given(st.integers(0, len(EVERY_SPEC) - 1), st.integers(0, 2**32))
def test_a_wrong_spec_differs_in_what_it_says_it_differs_in(index, seed):
    _, spec = EVERY_SPEC[index]
    wrong, kind = captions.wrong_in_one(spec, np.random.default_rng(seed))
    assert wrong != spec
    changed = {
        "shape": sorted(n.shape for n in wrong.nouns) != sorted(n.shape for n in spec.nouns),
        "count": [n.count for n in wrong.nouns] != [n.count for n in spec.nouns],
        "place": wrong.relation != spec.relation,
    }
    colours = {sorted(str(n.colour) for n in s.nouns).__repr__() for s in (wrong, spec)}
    changed["colour"] = len(colours) == 2
    changed["binding"] = kind == "binding" and [n.colour for n in wrong.nouns] == [n.colour for n in spec.nouns][::-1]
    assert [k for k, is_changed in changed.items() if is_changed] == [kind]


@pytest.mark.parametrize(
    "text", ["", "a dog", "circle", "a red circle and", "six circles", "a circle near a ring", "a circle, a ring"]
)
def test_text_outside_of_the_grammar_is_refused_with_its_words(text):
    with pytest.raises(ValueError, match="cannot read the caption"):
        captions.parse(text)


def test_articles_and_plurals():
    assert captions.phrase(Spec((Noun("ring", "orange"),))) == "an orange ring"
    assert captions.phrase(Spec((Noun("cross", count=3),))) == "three crosses"
    assert captions.phrase(Spec((Noun("ring"), Noun("cross", "red")), RELATIONS[0])) == "a ring left of a red cross"


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: captions.specs("colour"), "the six are"), (lambda: captions.prompts("colours", "test"), "it is")],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
