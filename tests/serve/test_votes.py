"""Choices between two pictures: each counts once, whichever side it was on."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from pipelines.report import wilson
from serve.studio import pages
from serve.studio.votes import Pair, Votes


@pytest.fixture
def votes(tmp_path):
    return Votes(tmp_path / "some" / "votes.db")


def test_a_model_wins_on_either_side(votes):
    sides = [("a", "b", "left"), ("b", "a", "right"), ("a", "b", "right"), ("b", "a", "same"), ("b", "a", "right")]
    for number, (left, right, choice) in enumerate(sides):
        votes.show(Pair(str(number), "a red ring", number, left, right))
        assert votes.choose(str(number), choice)
    votes.show(Pair("open", "a red ring", 9, "a", "b"))  # shown, and nobody chose
    (standing,) = votes.standings()
    assert standing[:5] == ("a", "b", 3, 1, 1)
    assert standing.rate == 0.75
    assert (standing.low, standing.high) == wilson(3 / 4, 4)


def test_a_pair_is_in_random_order(votes, monkeypatch):
    async def match(request, megabytes):
        return b'{"model": "base", "other": "mine"}'

    async def resolved(name):
        return "" if name == "base" else name

    monkeypatch.setattr(pages, "body", match)
    studio = pages.Studio(votes=votes.file)
    front = SimpleNamespace(resolved=resolved, settings=SimpleNamespace(studio=studio, base="shapes"))

    async def pair():
        made = await pages.new_pair(None, front)
        return votes.pair(made["id"])

    orders = {(one.left, one.right) for one in (asyncio.run(pair()) for _ in range(64))}  # or once in 2e19
    assert orders == {("base:shapes", "mine"), ("mine", "base:shapes")}


def test_the_model_that_was_chosen_more_often_is_first(votes):
    votes.show(Pair("0", "p", 0, "a", "b"))
    votes.choose("0", "right")
    assert votes.standings()[0][:4] == ("b", "a", 1, 0)


def test_ties_alone_are_no_result(votes):
    votes.show(Pair("0", "p", 0, "a", "b"))
    votes.choose("0", "same")
    assert votes.standings() == []


def test_a_pair_is_chosen_from_once(votes):
    votes.show(Pair("0", "p", 0, "a", "b"))
    assert votes.pair("0") == Pair("0", "p", 0, "a", "b")
    assert votes.choose("0", "left")
    assert not votes.choose("0", "right")
    assert not votes.choose("unknown", "left")
    assert votes.pair("unknown") is None
    with pytest.raises(ValueError, match="'both' is none of left, right, same"):
        votes.choose("0", "both")


def test_processes_at_once_lose_nothing(votes):
    def vote(start):
        for number in range(start, start + 20):
            votes.show(Pair(str(number), "p", number, "a", "b"))
            votes.choose(str(number), "left")

    threads = [threading.Thread(target=vote, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert votes.standings()[0].wins == 80
