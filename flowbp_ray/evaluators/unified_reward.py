"""UnifiedReward (arXiv 2503.05236) behind any OpenAI-compatible server: how well a picture fits its prompt, and how good it is.

`CodeGoat24/UnifiedReward-7b-v1.5` answers a question about a picture with text that ends in "Final Score: x", x in 1…5. The two
questions here are worded by this project and not as published: their scores compare with each other and with no table.
"""

import base64
import http.client
import io
import json
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flowbp_ray.evaluators import Row, paired

SIDE = 512  # pixels of the square that the server is shown
SCORE = re.compile(r"final score:[\s*]*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
CAPTION = "Finish with one line 'Final Score: ' and a number from 1 to 5, decimals allowed.\nCaption: {prompt}"
QUESTIONS = {
    "alignment": "A model drew this picture from the caption below. Judge only whether it shows what the caption says: which "
    f"things, how many, with which properties, how they lie to each other. 1 is nothing of it, 5 is all of it. {CAPTION}",
    "quality": "A model drew this picture from the caption below. Judge only how good a picture it is, whether it fits or not: "
    f"sharpness, detail, colours, absence of flaws, beauty. 1 is unusable, 5 is flawless. {CAPTION}",
}


class ServerError(RuntimeError):
    """No score could be had; the sentence names the server, the prompt, and what was answered."""


class UnifiedReward:
    """Asks the server at ``url``, which ends in ``/v1``, ``workers`` questions at a time.

    ``key_variable`` names the environment variable with the API key, where the server wants one; the key is in no message. A
    question is put up to ``tries`` times, ``wait``, 2 · ``wait``, 4 · ``wait``… seconds apart, while there is no connection, no
    answer within ``timeout`` seconds, or one of 429 or 5xx.
    """

    def __init__(
        self,
        url: str,
        model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
        key_variable: str | None = None,
        *,
        workers: int = 8,
        timeout: float = 120.0,
        tries: int = 4,
        wait: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of a server: write it as http://HOST:PORT/v1")
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.workers, self.timeout, self.tries, self.wait = workers, timeout, tries, wait
        self._key()

    def __call__(self, pictures: np.ndarray, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """``alignment`` and ``quality``, ``(B,)`` float64 in 1…5 each, of pictures ``(B, H, W, 3)``; else ServerError."""
        paired(pictures, rows)
        shown = [(_data_url(picture), row["prompt"]) for picture, row in zip(pictures, rows, strict=True)]
        with ThreadPoolExecutor(self.workers) as pool:
            scores = list(pool.map(lambda asked: self._score(*asked), [(name, *each) for name in QUESTIONS for each in shown]))
        return dict(zip(QUESTIONS, np.array(scores, np.float64).reshape(len(QUESTIONS), len(rows)), strict=True))

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if self.key_variable and not (key and key.isascii() and key.isprintable()):  # http.client would print a broken one
            raise ValueError(f"{self.key_variable} has no API key for {self.url}: set that environment variable to one")
        return key

    def _score(self, name: str, image: str, prompt: str) -> float:
        question = {"type": "text", "text": QUESTIONS[name].format(prompt=prompt)}
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}, question]}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 4096}
        status, answer = self._answer(json.dumps(body).encode())
        try:
            said = str(json.loads(answer)["choices"][0]["message"]["content"]) if status == 200 else ""
        except (ValueError, LookupError, TypeError):
            said = ""
        found = SCORE.findall(said)
        if found and 1 <= float(found[-1]) <= 5:
            return float(found[-1])
        key = self._key()  # some servers repeat the key that they refuse
        said, answer = (text.replace(key, "[key]") if key else text for text in (said, answer))
        what = f"HTTP {status}, {said[-300:] or answer[:300]!r}" if status else answer
        raise ServerError(f"asked for a score of {name} in 1…5 for {prompt!r}, {self.url} answered {what}: see the server's log")

    def _answer(self, body: bytes) -> tuple[int, str]:
        """Status and text of the server's answer, or 0 and why there is none."""
        key = self._key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        status, answer = 0, "nothing, not having been asked"
        for attempt in range(self.tries):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
            try:
                with urllib.request.build_opener(_AsAnswered).open(request, timeout=self.timeout) as response:
                    status, answer = response.status, response.read().decode("utf-8", "replace")
            except (OSError, http.client.HTTPException) as error:
                status, answer = 0, f"{type(error).__name__}: {error}"
            if status and status < 500:
                break
        return status, answer


class _AsAnswered(urllib.request.HTTPErrorProcessor):
    """Every status is an answer, so that its text can be told, and no redirection takes the key elsewhere."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def _data_url(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
