import collections
import re
from pathlib import Path

import pytest

from flowbp_ray.config import load
from flowbp_ray.config.schema import Prompts
from flowbp_ray.rollouts.prompts import pictured, read_prompts
from flowbp_ray.shapes.captions import is_evaluation, parse, task_of

SPARSE = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


def read(file, text):
    file.write_text(text, "utf-8")
    return read_prompts(Prompts(path=str(file)))


def test_the_embedded_prompts_have_every_task_evenly_and_none_of_the_evaluation():
    prompts = read_prompts(Prompts(path="shapes"))
    assert set(collections.Counter(task_of(parse(p)) for p in prompts).values()) == {500}
    assert not any(is_evaluation(parse(p), p) for p in prompts)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    assert read(tmp_path / "p.txt", "a cat\n\n  a dog, überall \n") == ["a cat", "a dog, überall"]


def test_a_jsonl_file_has_an_object_a_line(tmp_path):
    assert read(tmp_path / "p.jsonl", '{"prompt": "a cat", "id": 3}\n\n{"prompt": " a dog "}\n') == ["a cat", "a dog"]


@pytest.mark.parametrize("line", ["{", '"a cat"', '{"text": "a cat"}', "[1]"])
def test_a_bad_line_is_named(tmp_path, line):
    with pytest.raises(ValueError, match=re.escape(f'p.jsonl, line 2: write an object with "prompt", not {line!r}')):
        read(tmp_path / "p.jsonl", f'{{"prompt": "a cat"}}\n{line}\n')


def test_an_empty_prompt_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: the prompt is 3, not text"):
        read(tmp_path / "p.jsonl", '{"prompt": 3}\n')


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no prompts in"):
        read(tmp_path / "p.txt", "\n \n")


def test_a_prompt_that_is_there_twice_or_too_long_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"p\.txt: prompt 3 is prompt 1 again, 'a cat': remove one"):
        read(tmp_path / "p.txt", "a cat\na dog\n a cat\n")
    with pytest.raises(ValueError, match=r"p\.txt, line 2: the prompt has 100,000 characters, and no model reads 10,000"):
        read(tmp_path / "p.txt", "a cat\n" + 100_000 * "a" + "\n")


def test_a_json_file_has_a_list_of_prompts_or_of_objects(tmp_path):
    assert read(tmp_path / "p.json", '["a cat", {"prompt": " a dog ", "id": 3}]') == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1,", "p.json, line 1: invalid JSON"),
        ('{"prompt": "a cat"}', "p.json has to be a list of prompts"),
        ('["a cat", 3]', "p.json, entry 2: write an object with \"prompt\", not '3'"),
        ("[]", "there are no prompts in"),
    ],
)
def test_a_bad_json_file_is_refused(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(tmp_path / "p.json", text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=r"p\.txt is not text in UTF-8"):
        read_prompts(Prompts(path=str(tmp_path / "p.txt")))


def test_each_prompt_is_pictured_so_often_or_all_in_turn(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "id": 1}\n{"prompt": "a dog", "id": 2}\n')
    file = f"evaluation.prompts={tmp_path}/p.jsonl"
    ids = [row["id"] for row in pictured(load(SPARSE, [file, "evaluation.per_prompt=2"]))["prompts"]]
    assert ids == [1, 1, 2, 2]
    assert [row["id"] for row in pictured(load(SPARSE, [file, "evaluation.per_task=3"]))["prompts"]] == [1, 2, 1]


def test_geneval_needs_prompts_of_all_of_its_tasks(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}\n')
    config = load(SPARSE, [f"evaluation.prompts={tmp_path}/m.jsonl", "evaluation.geneval={}"])
    with pytest.raises(ValueError, match="has no prompts of single_object, two_object, colors, position, color_attr: GenEval's"):
        pictured(config)
