"""The reward service over HTTP, for people and programs: pictures and prompts in, every component's score out.

    serve run configs/serve/rewards.yaml
    curl -H "Authorization: Bearer $FLOWBP_TOKEN" -H "Content-Type: image/png" --data-binary @ring.png \
        "http://127.0.0.1:8000/rewards/v1/score?prompt=a%20red%20ring"

This process checks tokens, sizes and pictures and holds no model. `serve.rewards`, behind it, also serves alignments on the same
cluster (``reward.application`` in their configuration).
"""

import asyncio
import base64
import binascii
import contextlib
import io
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, Field, PositiveInt
from ray import serve
from ray.serve.handle import DeploymentHandle

from flowbp_ray.config.reward import Replicas, Reward
from flowbp_ray.config.schema import Model
from flowbp_ray.rollouts import asking
from serve.guard import Guarded, bearer, body, entitled, parsed, token

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG"}
MOST = 64  # pictures of a request
NARROWEST = 8  # times as long as wide: rewards' models resize by the shorter side, so what is narrower takes any memory

Prompt = Annotated[str, Field(min_length=1, max_length=10_000)]


class ServedRewards(Guarded):
    """The ``args`` of this application in a Serve configuration file."""

    reward: Reward
    """What pictures are scored by, as in an alignment's configuration."""
    model: Model | None = None
    """The model whose decoder alignments need that ask this service; null serves HTTP alone."""
    rewards: Replicas = Replicas()
    """Processes that score what has no deployment of its own, and decode."""
    threads: PositiveInt = 1
    """torch's threads in each of these processes."""
    max_megapixels: PositiveInt = 16
    """The most that the pictures of a request may have together."""


class Item(BaseModel):
    """A picture and what it should show."""

    prompt: Prompt
    image: str = Field(description="A PNG or JPEG in base64, with or without 'data:image/png;base64,' before it.")


class Items(BaseModel):
    """A request for scores."""

    items: list[Item] = Field(min_length=1, max_length=MOST)


class Answer(BaseModel):
    """Scores, picture by picture in the request's order."""

    scores: list[dict[str, float]] = Field(description="By component; flowbp_ray/rewards/README.md has the range of each.")


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "A broken picture, or one of another format"},
    401: {"model": Refusal, "description": "No token, or a wrong one"},
    413: {"model": Refusal, "description": "Too large a body, or too many pixels"},
    415: {"model": Refusal, "description": "Another content type"},
    422: {"model": Refusal, "description": "Something missing or of the wrong kind"},
    502: {"model": Refusal, "description": "A reward failed"},
}
SCHEMA = Items.model_json_schema()  # FastAPI describes bodies only that it reads itself
SCHEMA["properties"]["items"]["items"] = SCHEMA.pop("$defs")["Item"]
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SCHEMA}}
        | {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS},
    }
}

api = FastAPI(title="Rewards", version="1", description="Scores of pictures by every reward that is served.")


@api.exception_handler(ValueError)
async def refused(request: Request, error: ValueError) -> Response:
    """Bad input that only a reward finds out."""
    return JSONResponse({"detail": str(error)}, 400)


def decoded(text: str, number: int) -> bytes:
    """The bytes of base64, with or without the head of a data URL; 400 if it is none."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"items.{number}.image is no base64") from error


def opened(file: bytes, number: int, most: int) -> np.ndarray:
    """The picture uint8 ``(H, W, 3)`` of a PNG or JPEG, upright; 400 if it is none, or as good as a line, 413 if it has more
    pixels. Of these two nothing is decoded."""
    try:
        with Image.open(io.BytesIO(file), formats=tuple(FORMATS.values())) as image:
            if image.width * image.height > most:
                raise HTTPException(413, f"picture {number} has {image.width}×{image.height} pixels: too many for one request")
            if max(image.size) > NARROWEST * min(image.size):
                raise HTTPException(
                    400, f"picture {number} has {image.width}×{image.height} pixels: at most {NARROWEST} times as long as wide"
                )
            image.load()
            upright: Image.Image = image
            with contextlib.suppress(Exception):  # of tags that cannot be read, in any way: they turn nothing
                upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for broken files
        raise HTTPException(400, f"picture {number} is no whole PNG or JPEG") from error


# Last: Serve keeps a copy of the application as it is here, with what it refers to.
@serve.ingress(api)
class Front:
    """A replica that answers HTTP."""

    def __init__(self, settings: ServedRewards, rewards: DeploymentHandle) -> None:
        self.settings, self.rewards = settings, rewards
        self.token = token(settings, "reward service")

    @api.post("/v1/score", responses=REFUSALS, openapi_extra=BODY, dependencies=[Depends(bearer)])
    async def score(self, request: Request, prompt: Annotated[Prompt | None, Query()] = None) -> Answer:
        """Score pictures: JSON with up to 64 of them, or one picture as the body and its prompt in the query."""
        entitled(request, self.token)
        content = await body(request, self.settings.max_megabytes)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            if prompt is not None:
                raise HTTPException(422, "a JSON body has the prompts: leave ?prompt= out")
            items = parsed(Items, content, 422).items
            prompts = [item.prompt for item in items]
            files = [decoded(item.image, number) for number, item in enumerate(items)]
        elif kind in FORMATS:
            if prompt is None:
                raise HTTPException(422, "the prompt is missing: give ?prompt=… beside a picture")
            prompts, files = [prompt], [content]
        else:
            raise HTTPException(415, f"send application/json, {' or '.join(FORMATS)}, not {kind or 'nothing'!r}")
        return await asyncio.to_thread(self._score, files, prompts)

    @api.get("/v1/components", dependencies=[Depends(bearer)], responses={401: REFUSALS[401]})
    async def components(self, request: Request) -> dict[str, Any]:
        """What is served: each component's kind and model."""
        entitled(request, self.token)
        described: dict[str, Any] = await self.rewards.describe.remote()
        return described

    @api.get("/healthz")
    async def healthz(self) -> str:
        """Whether this answers."""
        return "ok"

    def _score(self, files: list[bytes], prompts: list[str]) -> Answer:
        left, pictures = self.settings.max_megapixels * 10**6, []
        for number, file in enumerate(files):
            picture = opened(file, number, left)
            left -= picture.shape[0] * picture.shape[1]
            pictures.append(picture)
        scores: list[dict[str, float]] = [{} for _ in files]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            sizes.setdefault(picture.shape, []).append(number)
        asked = []
        for numbers in sizes.values():  # a batch has one size
            batch, texts = np.stack([pictures[n] for n in numbers]), [prompts[n] for n in numbers]
            asked.append((numbers, asking.Request(self.rewards, "judge", batch, texts, what="scoring", prompts=texts)))
        try:
            for numbers, request in asked:
                for name, values in request.result().items():
                    for n, value in zip(numbers, values.tolist(), strict=True):
                        scores[n][name] = value
        except asking.GivenUpError as error:
            raise HTTPException(502, str(error)) from error
        return Answer(scores=scores)


def build(args: ServedRewards) -> serve.Application:
    """The application of a Serve configuration file."""
    from serve.rewards import composed

    front = serve.deployment(
        name="Front",
        num_replicas=args.fronts,
        ray_actor_options={"num_cpus": args.front_cpus},
        max_ongoing_requests=32,
    )(Front)
    return front.bind(args, composed(args.model, args.reward, args.rewards, args.threads))
