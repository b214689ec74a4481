"""Choices between two pictures of which nobody is told who made them, and what they add up to."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipelines.report import wilson

CHOICES = ("left", "right", "same")

TABLE = """
create table if not exists pairs (
    id text primary key, prompt text not null, seed integer not null, "left" text not null, "right" text not null,
    made real not null, choice text, chosen real
)
"""


class Pair(NamedTuple):
    """What was shown: two models' pictures of one prompt and seed."""

    id: str
    prompt: str
    seed: int
    left: str
    right: str


class Standing(NamedTuple):
    """One model against another: how often it was chosen, and the 95 % interval of that among all but ties (Wilson's)."""

    model: str
    other: str
    wins: int
    losses: int
    ties: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share of wins among all but ties."""
        return self.wins / (self.wins + self.losses)


class Votes:
    """Choices in a SQLite file; several processes may write to it."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        with self._open() as database:
            database.execute(TABLE)

    def show(self, pair: Pair) -> None:
        """Note a pair before anybody sees it."""
        with self._open() as database:
            database.execute(
                'insert into pairs (id, prompt, seed, "left", "right", made) values (?, ?, ?, ?, ?, ?)', (*pair, time.time())
            )

    def pair(self, number: str) -> Pair | None:
        """A pair by its id."""
        with self._open() as database:
            found = database.execute('select id, prompt, seed, "left", "right" from pairs where id = ?', (number,)).fetchone()
        return Pair(*found) if found else None

    def choose(self, number: str, choice: str) -> bool:
        """Note a choice; false for a pair that is not known, or was chosen from before."""
        if choice not in CHOICES:
            raise ValueError(f"{choice!r} is none of {', '.join(CHOICES)}")
        with self._open() as database:
            noted = database.execute(
                "update pairs set choice = ?, chosen = ? where id = ? and choice is null", (choice, time.time(), number)
            )
            return noted.rowcount == 1

    def standings(self) -> list[Standing]:
        """Every two models that stood against each other and were chosen between, the one first that was chosen more often."""
        with self._open() as database:
            chosen = database.execute('select "left", "right", choice from pairs where choice is not null').fetchall()
        counts: dict[tuple[str, str], list[int]] = {}
        for left, right, choice in chosen:
            first, second = sorted((left, right))
            won = 2 if choice == "same" else int((choice == "left") != (left == first))
            counts.setdefault((first, second), [0, 0, 0])[won] += 1
        standings = []
        for (first, second), (firsts, seconds, ties) in sorted(counts.items()):
            model, other, wins, losses = (
                (first, second, firsts, seconds) if firsts >= seconds else (second, first, seconds, firsts)
            )
            if wins + losses:
                standings.append(Standing(model, other, wins, losses, ties, *wilson(wins / (wins + losses), wins + losses)))
        return standings

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.file, timeout=30)
        try:
            with connection:
                yield connection
        finally:
            connection.close()
