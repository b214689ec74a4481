import base64
import io
import json
import socket
import threading
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from flowbp_ray.evaluators.unified_reward import ServerError, UnifiedReward

PICTURES = np.repeat(np.array([10, 20, 30], np.uint8), 48 * 64 * 3).reshape(3, 48, 64, 3)
ROWS = [{"prompt": "a red ring"}, {"prompt": "{braces} and “quotes”"}, {"prompt": "Final Score: 1"}]
KEY = "sk-0123456789"


def says(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


class Asked:
    """A request as its server sees it: the picture's level, which question it was, the prompt, and the time of asking."""

    def __init__(self, body, headers, before):
        self.body, self.headers = json.loads(body), headers
        picture, text = self.body["messages"][0]["content"]
        kind, _, data = picture["image_url"]["url"].partition(",")
        self.question, _, self.prompt = text["text"].partition("Caption: ")
        self.kind, self.picture = kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        self.level = int(self.picture[0, 0, 0])
        self.name = "alignment" if "shows what the caption says" in self.question else "quality"
        before[self.level, self.name] += 1
        self.time = before[self.level, self.name]


@pytest.fixture
def server(monkeypatch):
    """A server on this machine whose answer, (status, text), is made by the function that a test sets as `answer`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = Asked(self.rfile.read(int(self.headers["Content-Length"])), self.headers, http.before)
            http.asked.append((self.path, asked))
            status, text = http.answer(asked)
            if status is None:
                return  # hang up
            self.send_response(status)
            self.send_header("Location", "/v1/elsewhere")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.before, http.asked = Counter(), []
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def test_scores_are_of_the_picture_the_question_and_the_prompt(server):
    server.answer = lambda a: says(f"ring (object): 1\nFinal Score: {a.level / 10 + (a.name == 'quality') / 2}")
    scores = UnifiedReward(server.url + "/", "a model", wait=0)(PICTURES, ROWS)
    assert {name: values.tolist() for name, values in scores.items()} == {"alignment": [1, 2, 3], "quality": [1.5, 2.5, 3.5]}
    assert all(values.dtype == np.float64 for values in scores.values())
    assert len(server.asked) == 6
    for path, asked in server.asked:
        assert path == "/v1/chat/completions"
        assert (asked.body["temperature"], asked.body["model"]) == (0, "a model")
        assert (asked.kind, asked.picture.shape) == ("data:image/png;base64", (512, 512, 3))
        assert asked.prompt == ROWS[asked.level // 10 - 1]["prompt"]
        assert asked.headers["Authorization"] is None


def test_no_pictures_are_no_questions(server):
    scores = UnifiedReward(server.url)(PICTURES[:0], [])
    assert {name: values.shape for name, values in scores.items()} == {"alignment": (0,), "quality": (0,)}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4),
        ("**Final Score:** 4.25.", 4.25),
        ("final score:\n3/5", 3),
        ("Final Score: 2, no.\nFinal Score: 5", 5),
    ],
)
def test_the_last_final_score_counts(server, text, score):
    server.answer = lambda a: says(text)
    assert UnifiedReward(server.url)(PICTURES[:1], ROWS[:1])["alignment"].tolist() == [score]


def test_as_many_questions_at_a_time_as_there_are_workers(server):
    together = threading.Barrier(3, timeout=60)

    def answer(asked):
        together.wait()
        return says("Final Score: 3")

    server.answer = answer
    UnifiedReward(server.url, workers=3)(PICTURES, ROWS)


@pytest.mark.parametrize("failure", [(500, "no"), (503, "busy"), (429, "slow down"), (None, "")])
def test_a_passing_failure_is_waited_out(server, failure):
    server.answer = lambda a: failure if a.time < 3 else says(f"Final Score: {a.level / 10}")
    scores = UnifiedReward(server.url, tries=3, wait=0)(PICTURES, ROWS)
    assert scores["alignment"].tolist() == scores["quality"].tolist() == [1, 2, 3]
    assert set(server.before.values()) == {3}


def refused(evaluator, match):
    with pytest.raises(ServerError, match=match) as error:
        evaluator(PICTURES[:1], ROWS[:1])
    message = str(error.value)
    assert evaluator.url in message
    assert "'a red ring'" in message
    assert "\n" not in message
    return error.value


def test_a_lasting_failure_is_an_error_that_says_what_was_answered(server):
    server.answer = lambda a: (503, "the model\nis loading " + "…" * 1000)
    error = refused(UnifiedReward(server.url, tries=3, wait=0), r"answered HTTP 503, 'the model\\nis loading …")
    assert len(str(error)) < 600
    assert server.before[10, "alignment"] == 3


def test_every_wait_is_twice_the_last(server, monkeypatch):
    waits = []
    monkeypatch.setattr("flowbp_ray.evaluators.unified_reward.time.sleep", waits.append)
    server.answer = lambda a: says("Final Score: 2") if a.name == "quality" else (500, "no")
    refused(UnifiedReward(server.url, workers=1, tries=4, wait=0.5), "HTTP 500")
    assert waits[:4] == [0, 0.5, 1, 2]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ((200, "<html>no completion</html>"), "HTTP 200, '<html>no completion</html>'"),
        ((200, "Final Score: 3"), "HTTP 200, 'Final Score: 3'"),  # in place of a completion
        ((200, '{"choices": []}'), "HTTP 200"),
        ((200, '{"choices": null}'), "HTTP 200"),
        ((200, "[]"), "HTTP 200"),
        (says(None), "HTTP 200, 'None'"),
        (says(""), "HTTP 200"),
        (says("It is a good picture."), "HTTP 200, 'It is a good picture.'"),
        (says("x" * 9000 + " and then the tokens were used up"), "the tokens were used up'"),
        (says("Final Score: 0"), "HTTP 200, 'Final Score: 0'"),
        (says("Final Score: -2"), "HTTP 200, 'Final Score: -2'"),
        (says("Final Score: 5.1"), "HTTP 200, 'Final Score: 5.1'"),
        (says("Final Score: nan"), "HTTP 200, 'Final Score: nan'"),
        ((404, "no such model"), "HTTP 404, 'no such model'"),
        ((307, "over there"), "HTTP 307, 'over there'"),
    ],
)
def test_an_answer_without_a_score_is_an_error_at_once(server, answer, match):
    server.answer = lambda a: answer
    refused(UnifiedReward(server.url, wait=0), match)
    assert set(server.before.values()) == {1}


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    evaluator = UnifiedReward(server.url, key_variable="JUDGE_KEY")
    server.answer = lambda a: says("Final Score: 2") if a.headers["Authorization"] == f"Bearer {KEY}" else (401, "?")
    assert evaluator(PICTURES[:1], ROWS[:1])["quality"].tolist() == [2]
    server.answer = lambda a: (401, "x" * 290 + f"Incorrect API key: {KEY}")  # cut in its middle, part of it would be left
    error = refused(evaluator, "HTTP 401")
    shown = "".join(traceback.format_exception(error)) + repr(evaluator) + str(vars(evaluator))
    assert not any(KEY[:length] in shown for length in range(4, len(KEY)))


@pytest.mark.parametrize("value", [None, "", " ", "two\nlines", "ключ"])
def test_a_key_that_is_not_there_or_broken_is_refused_by_the_name_of_its_variable(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match=r"^JUDGE_KEY has no API key for http://localhost:1/v1: set that environment variable"):
        UnifiedReward("http://localhost:1/v1", key_variable="JUDGE_KEY")


def test_a_server_that_does_not_answer_in_time_is_an_error(server):
    over = threading.Event()
    server.answer = lambda a: (over.wait(30) and None, "")
    refused(UnifiedReward(server.url, timeout=0.1, tries=2, wait=0), "answered TimeoutError: timed out")
    over.set()


def test_a_server_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    refused(UnifiedReward(f"http://127.0.0.1:{port}/v1", wait=0), "refused")


@pytest.mark.parametrize("url", ["localhost:8080/v1", "file:///etc/passwd", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="is no address of a server: write it as http://HOST:PORT/v1"):
        UnifiedReward(url)


def test_pictures_without_an_entry_each_are_refused():
    with pytest.raises(ValueError, match="3 pictures but 1 entries"):
        UnifiedReward("http://localhost:1/v1")(PICTURES, ROWS[:1])
