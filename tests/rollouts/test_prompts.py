import collections
import re

import pytest

from flowbp_ray.config.schema import Prompts
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.shapes.captions import is_evaluation, parse, task_of


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
