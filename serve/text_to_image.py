"""Text to image over HTTP, as OpenAI's clients ask for it: a base pipeline, and any number of adapters on it.

    serve run configs/serve/text_to_image.yaml
    curl -H "Authorization: Bearer $FLOWBP_TOKEN" -H "Content-Type: application/json" \
        -d '{"model": "shapes-aligned@champion", "prompt": "a red ring", "seed": 1}' http://127.0.0.1:8000/v1/images/generations

``model`` is the base's name, a registered model's (``NAME``, ``NAME/VERSION``, ``NAME@ALIAS``), a run's id, or the name of an
adapter's folder. This process checks tokens, sizes and names and holds no model; `serve.painter`, behind it, does.
"""

import asyncio
import base64
import re
import secrets
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import ray
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from ray import serve
from ray.serve.handle import DeploymentHandle

from flowbp_ray.pictures import file_of
from flowbp_ray.rollouts import asking
from flowbp_ray.tracking.store import tracking_uri, wait_less
from serve.catalogue import Catalogue, Named, label
from serve.guard import Guarded, bearer, body, entitled, parsed, token
from serve.painter import AHEAD, Painting, Picture, ReplacedError, painter
from serve.studio.pages import Studio, router

SEEDS = 2**32
AT_ONCE = 64  # requests in each process that answers HTTP


class TextToImage(Guarded, Painting, Named):
    """The ``args`` of this application in a Serve configuration file."""

    studio: Studio | None = None
    """Pages for people under /studio; null has none."""
    max_pictures: PositiveInt = 10
    """The most that a request may ask for."""
    max_pixels: PositiveInt = 2048 * 2048
    """The most that a picture may have."""
    max_steps: PositiveInt = 100
    """The most sampler steps."""


class Asked(BaseModel):
    """A request for pictures: OpenAI's fields, and what is of flow models; no other one, since it would be without effect."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=10_000)
    model: str | None = Field(None, max_length=300, description="Null is the base; GET /v1/models has a list.")
    n: int = Field(1, ge=1, description="How many pictures, of as many seeds.")
    size: str | None = Field(None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels.")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="`url` is a data URL.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="Null is png, which loses nothing.")
    user: str | None = Field(None, description="Not looked at.")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="Of the first picture; further ones count on. Null draws one.")
    steps: int | None = Field(None, ge=1, description="Sampler steps.")
    guidance_scale: float | None = Field(None, ge=0, le=100)
    strength: float = Field(1.0, ge=-4, le=4, description="Of the adapter: 0 is the base, 1 as trained.")


class Made(BaseModel):
    """A picture."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Answer(BaseModel):
    """Pictures, by seed."""

    created: int
    data: list[Made]
    output_format: str
    size: str
    model: str = Field(description="Which adapter that was: a version where the request had an alias.")


class Refusal(BaseModel):
    """Why there is no answer, as OpenAI says it."""

    error: dict[str, str | None]


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "Something missing, of the wrong kind, or too much of it"},
    401: {"model": Refusal, "description": "No token, or a wrong one"},
    404: {"model": Refusal, "description": "No such model"},
    413: {"model": Refusal, "description": "Too large a body"},
    503: {"model": Refusal, "description": "The pictures could not be made; later they may"},
}
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": Asked.model_json_schema()}}}}
KINDS = {401: "authentication_error", 404: "not_found_error", 503: "server_error"}

api = FastAPI(title="Text to image", version="1", description="Pictures by a base pipeline and the adapters on it.")
api.include_router(router)


@api.exception_handler(HTTPException)
async def refused(request: Request, error: HTTPException) -> Response:
    """In OpenAI's words."""
    kind = KINDS.get(error.status_code, "invalid_request_error")
    said = {"message": error.detail, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": said}, error.status_code, error.headers)


def wanted(asked: Asked, settings: TextToImage) -> list[Picture]:
    """The pictures of a request; 400 for more than is allowed."""
    sampling = settings.sampling
    width, height = sampling.width, sampling.height
    if asked.size not in (None, "auto"):
        width, height = map(int, asked.size.split("x"))
    steps = asked.steps or sampling.steps
    for what, number, most in (
        ("n", asked.n, settings.max_pictures),
        ("size", width * height, settings.max_pixels),
        ("steps", steps, settings.max_steps),
    ):
        if number > most:
            raise HTTPException(400, f"{what}: {number} is too much, at most {most}{' pixels' if what == 'size' else ''}")
    guidance_scale = sampling.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    first = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
    seeds = [(first + n) % SEEDS for n in range(asked.n)]
    return [Picture(asked.prompt, seed, asked.strength, steps, guidance_scale, height, width) for seed in seeds]


def described(name: str) -> dict[str, Any]:
    """A model as OpenAI lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "flowbp_ray"}


def exported() -> list[str]:
    """Lines of metrics of every machine that are about Serve, or this service. OSError if a machine gives none."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            at = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(at, timeout=10) as answer:
                text = answer.read().decode()
            found += [line for line in text.splitlines() if re.match(r"(# (HELP|TYPE) )?ray_(serve|flowbp)_", line)]
    return found


# Last: Serve keeps a copy of the application as it is here, with what it refers to.
@serve.ingress(api)
class Front:
    """A replica that answers HTTP."""

    def __init__(self, settings: TextToImage, painter: DeploymentHandle) -> None:
        self.settings, self.painter = settings, painter
        self.token = token(settings, "text-to-image service")
        self.catalogue = Catalogue(settings, settings.base)
        # Threads that only wait: by itself a replica has so few that those who wait would hold up everybody.
        self.waiting = ThreadPoolExecutor(AT_ONCE)
        self.looking = ThreadPoolExecutor(8)
        wait_less()

    @api.post("/v1/images/generations", responses=REFUSALS, openapi_extra=BODY, dependencies=[Depends(bearer)])
    async def generations(self, request: Request) -> Answer:
        """Sample pictures."""
        entitled(request, self.token)
        asked = parsed(Asked, await body(request, self.settings.max_megabytes))
        pictures = wanted(asked, self.settings)
        name, made = await self.sampled(asked.model, pictures)
        kind = asked.output_format or "png"
        files = await asyncio.to_thread(lambda: [base64.b64encode(file_of(p, kind)).decode() for p in made])
        by_url = asked.response_format == "url"
        return Answer(
            created=int(time.time()),
            data=[
                Made(url=f"data:image/{kind};base64,{file}", seed=p.seed) if by_url else Made(b64_json=file, seed=p.seed)
                for p, file in zip(pictures, files, strict=True)
            ],
            output_format=kind,
            size=f"{pictures[0].width}x{pictures[0].height}",
            model=label(name) or self.settings.base,
        )

    @api.get("/v1/models", responses={401: REFUSALS[401]}, dependencies=[Depends(bearer)])
    async def models(self, request: Request) -> dict[str, Any]:
        """All that ``model`` can be, but for runs."""
        entitled(request, self.token)
        return {"object": "list", "data": [described(name) for name in await self.names()]}

    @api.get("/v1/models/{model:path}", responses={401: REFUSALS[401], 404: REFUSALS[404]}, dependencies=[Depends(bearer)])
    async def model(self, request: Request, model: str) -> dict[str, Any]:
        """Whether there is a model."""
        entitled(request, self.token)
        await self.resolved(model)
        return described(model)

    @api.get("/healthz")
    async def healthz(self) -> str:
        """Whether this answers."""
        return "ok"

    @api.get("/metrics", responses={401: REFUSALS[401], 503: REFUSALS[503]}, dependencies=[Depends(bearer)])
    async def metrics(self, request: Request) -> Response:
        """What Ray measures of Serve's deployments and their replicas, on all machines, as Prometheus reads it."""
        entitled(request, self.token)
        try:
            lines = await asyncio.to_thread(exported)
        except OSError as error:
            raise HTTPException(503, f"Ray gives no metrics: {error}") from error
        return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")

    async def resolved(self, model: str | None) -> str:
        """As `Catalogue.resolve`; only those wait for MLflow who ask for what it has."""
        return await asyncio.get_running_loop().run_in_executor(self.looking, self.catalogue.resolve, model) if model else ""

    async def names(self) -> list[str]:
        """As `Catalogue.names`."""
        return await asyncio.get_running_loop().run_in_executor(self.looking, self.catalogue.names)

    async def sampled(self, model: str | None, pictures: Sequence[Picture]) -> tuple[str, list[np.ndarray]]:
        """By what a request's model is, and as `draw`: all by one adapter, also while its folder is replaced."""
        for _ in range(3):
            name = await self.resolved(model)
            try:
                return name, await self.draw(name, pictures)
            except ReplacedError:
                continue
        raise HTTPException(503, f"{model} is replaced again and again: ask later")

    async def draw(self, name: str, pictures: Sequence[Picture]) -> list[np.ndarray]:
        """Sample uint8 pictures ``(H, W, 3)`` by what replicas know by the name. 400 for what cannot be sampled, 503 for what
        failed; ReplacedError if its folder has other weights by now."""
        handle, what = self.painter.options(multiplexed_model_id=name), f"sampling by {label(name) or 'the base'}"
        under_way = [asking.Request(handle, "draw", p, what=what, prompts=[p.prompt]) for p in pictures]
        try:
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*[loop.run_in_executor(self.waiting, r.result) for r in under_way])
        except ReplacedError:
            raise
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except asking.GivenUpError as error:
            raise HTTPException(503, str(error)) from error


def build(args: TextToImage) -> serve.Application:
    """The application of a Serve configuration file."""
    from serve.rewards import deployed

    what = deployed(painter(args.adapters_held), "Painter", args.images, at_once=AHEAD * args.batch)
    front = serve.deployment(
        name="Front", num_replicas=args.fronts, ray_actor_options={"num_cpus": args.front_cpus}, max_ongoing_requests=AT_ONCE
    )(Front)
    return front.bind(args, what.bind(args, tracking_uri(args.tracking_uri)))
