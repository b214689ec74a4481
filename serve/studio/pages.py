"""The studio's pages and what their script asks for. A visitor bears the service's token once, then has a cookie."""

import asyncio
import base64
import hashlib
import hmac
import random
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import parse_qs

import jinja2
import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from pydantic import BaseModel, Field
from ray import serve

from flowbp_ray.config import paths
from flowbp_ray.config.section import Section, Text
from flowbp_ray.pictures import file_of
from flowbp_ray.rollouts import asking
from flowbp_ray.rollouts.prompts import read_rows
from flowbp_ray.rollouts.stages import service
from flowbp_ray.shapes.captions import evaluation_prompts
from serve.catalogue import label
from serve.guard import body, parsed
from serve.painter import Picture, ReplacedError
from serve.studio import gallery
from serve.studio.votes import Pair, Votes

if TYPE_CHECKING:
    from serve.text_to_image import Front

HERE = Path(__file__).parent
COOKIE = "flowbp_studio"
BASE = "base:"  # of choices: stands before the base's name
STATIC = {"studio.css": "text/css", "studio.js": "text/javascript"}
#: Nothing is fetched from any other host, and no script runs that is not the studio's own.
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
SEEDS = 2**31

router = APIRouter(prefix="/studio", include_in_schema=False)
templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
)


class Studio(Section):
    """Pages for people under ``/studio``."""

    runs: paths.Folder = Path("~/.flowbp_ray/runs")
    """The folder of runs whose pictures are shown."""
    scores: Text | None = None
    """A reward application on the same cluster, such as ``rewards``, that scores each picture."""
    prompts: paths.PromptsPath = "shapes"
    """What the choices without names are of: a prompt file, or ``shapes``, the embedded world's evaluation prompts."""
    votes: paths.AbsolutePath = Path("~/.flowbp_ray/votes.db")
    """A SQLite file for these choices."""

    def texts(self) -> list[str]:
        """All prompts to choose by."""
        if self.prompts == paths.TRAINING_PROMPTS:
            return [text for task in evaluation_prompts(50, 0).values() for text in task]
        return [row["prompt"] for row in read_rows(Path(self.prompts))]


def here() -> "Front":
    """The replica that answers."""
    replica: Front = serve.get_replica_context().servable_object
    if replica.settings.studio is None:
        raise HTTPException(404, "this service has no studio: give its configuration one")
    return replica


AnyFront = Annotated[Any, Depends(here)]


def badge(token: str) -> str:
    """What a visitor's cookie has: not the token itself."""
    return hmac.new(token.encode(), b"studio", hashlib.sha256).hexdigest()


def visitor(request: Request, front: AnyFront) -> Any:
    """The replica, for somebody who may ask it; everybody else is asked for the token first."""
    if front.token is not None and not secrets.compare_digest(
        request.cookies.get(COOKIE, "").encode(), badge(front.token).encode()
    ):
        raise HTTPException(303, "give the token first", {"Location": f"{root(request)}/studio/login"})
    return front


Visited = Annotated[Any, Depends(visitor)]


def root(request: Request) -> str:
    """The application's own prefix."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def page(request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from its template."""
    text = templates.get_template(f"{name}.html").render(root=f"{root(request)}/studio", here=name, **values)
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(text, status, headers)


@router.get("/login")
async def ask_for_token(request: Request, front: AnyFront) -> Response:
    """The form for the token."""
    return page(request, "login", wrong=False)


@router.post("/login")
async def log_in(request: Request, front: AnyFront) -> Response:
    """Give a cookie for the token."""
    (token,) = parse_qs((await body(request, 1)).decode("utf-8", "replace")).get("token", [""])[:1]
    if front.token is not None and not secrets.compare_digest(token.strip().encode(), front.token.encode()):
        return page(request, "login", 401, wrong=True)
    answer = RedirectResponse(f"{root(request)}/studio", 303)
    if front.token is not None:
        answer.set_cookie(COOKIE, badge(front.token), httponly=True, samesite="strict", path=f"{root(request)}/studio")
    return answer


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """Style and script."""
    if name not in STATIC:
        raise HTTPException(404, f"there is no {name}")
    return FileResponse(HERE / "static" / name, media_type=STATIC[name])


@router.get("")
async def compare(request: Request, front: Visited) -> Response:
    """A prompt by several models side by side."""
    models = await front.names()
    return page(request, "compare", models=models, sampling=front.settings.sampling, scored=front.settings.studio.scores)


class Wish(BaseModel):
    """A picture for the page."""

    prompt: str = Field(min_length=1, max_length=10_000)
    model: str = Field(max_length=300)
    seed: int = Field(ge=0, lt=SEEDS)
    strength: float = Field(1.0, ge=-4, le=4)


@router.post("/pictures")
async def picture(request: Request, front: Visited) -> dict[str, Any]:
    """A picture, as a data URL, and what it scored."""
    wish = parsed(Wish, await body(request, 1))
    _, (drawn,) = await front.sampled(wish.model, [wished(front, wish.prompt, wish.seed, wish.strength)])
    scores = {}
    if application := front.settings.studio.scores:
        wait = asyncio.get_running_loop().run_in_executor
        try:
            scores = await wait(front.waiting, judged, application, drawn, wish.prompt)
        except KeyError as error:
            raise HTTPException(503, f"the application {application!r}, which scores, is not there: deploy it") from error
        except (asking.GivenUpError, ValueError) as error:  # of a reward of one's own, too
            raise HTTPException(503, f"the pictures are there, but not their scores: {error}") from error
    image = base64.b64encode(await asyncio.to_thread(file_of, drawn)).decode()
    return {"image": f"data:image/png;base64,{image}", "scores": scores}


def wished(front: Any, prompt: str, seed: int, strength: float = 1.0) -> Picture:
    """A picture as the service samples by itself."""
    sampling = front.settings.sampling
    return Picture(prompt, seed, strength, sampling.steps, sampling.guidance_scale, sampling.height, sampling.width)


def judged(application: str, drawn: np.ndarray, prompt: str) -> dict[str, float]:
    """Every reward's score of a picture."""
    asked = asking.Request(service(application), "judge", drawn[None], [prompt], what="scoring", prompts=[prompt])
    return {name: float(values[0]) for name, values in asked.result().items()}


@router.get("/runs")
async def all_runs(request: Request, front: Visited) -> Response:
    """Every run that has pictures."""
    folder = front.settings.studio.runs
    return await asyncio.to_thread(lambda: page(request, "runs", runs=gallery.runs(folder), folder=folder))


@router.get("/runs/{name}")
async def one_run(request: Request, front: Visited, name: str) -> Response:
    """A run through its steps, its table, and pictures of its evaluation."""
    return await asyncio.to_thread(lambda: page(request, "run", run=run_named(front, name)))


@router.get("/runs/{name}/files/{path:path}")
async def file(front: Visited, name: str, path: str) -> Response:
    """A picture of a run."""
    found = gallery.picture_of(run_named(front, name), path)
    if found is None:
        raise HTTPException(404, f"the run {name} has no picture {path}")
    return FileResponse(found, media_type="image/png")


def run_named(front: Any, name: str) -> gallery.Run:
    """A run; 404 if there is none."""
    found = gallery.run_of(front.settings.studio.runs, name)
    if found is None:
        raise HTTPException(404, f"there is no run {name} with pictures")
    return found


def votes(front: Any) -> Votes:
    """The choices, which are in a file."""
    return Votes(front.settings.studio.votes)


@router.get("/blind")
async def blind(request: Request, front: Visited) -> Response:
    """Choose between pictures without names."""
    return page(request, "blind", models=await front.names())


class Match(BaseModel):
    """Which two models stand against each other."""

    model: str = Field(max_length=300)
    other: str = Field(max_length=300)


@router.post("/pairs")
async def new_pair(request: Request, front: Visited) -> dict[str, str]:
    """A prompt, and the id of two pictures of it in random order; which is whose is kept here."""
    match = parsed(Match, await body(request, 1))
    names = [await front.resolved(m) for m in (match.model, match.other)]
    if names[0] == names[1]:
        raise HTTPException(400, f"{match.model} and {match.other} are the same: choose two models")
    draws = random.SystemRandom()
    draws.shuffle(names)
    prompt = draws.choice(await asyncio.to_thread(front.settings.studio.texts))
    named = [name or f"{BASE}{front.settings.base}" for name in names]  # the file may have another base's choices too
    pair = Pair(secrets.token_urlsafe(12), prompt, draws.randrange(SEEDS), *named)
    await asyncio.to_thread(lambda: votes(front).show(pair))
    return {"id": pair.id, "prompt": prompt}


@router.get("/pairs/{number}/{side}.png")
async def half(front: Visited, number: str, side: Literal["left", "right"]) -> Response:
    """One of a pair's pictures; nothing in it or beside it says whose it is."""
    pair = await asyncio.to_thread(lambda: votes(front).pair(number))
    if pair is None:
        raise HTTPException(404, "there is no such pair")
    by = pair.left if side == "left" else pair.right
    by = "" if by.startswith(BASE) else by
    try:
        (drawn,) = await front.draw(by, [wished(front, pair.prompt, pair.seed)])
    except (HTTPException, ReplacedError) as error:  # which would say by whom it was to be
        raise HTTPException(503, "one of the two pictures could not be made: begin again") from error
    content = await asyncio.to_thread(file_of, drawn)
    return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})


class Choice(BaseModel):
    """Which picture is the better one."""

    choice: Literal["left", "right", "same"]


@router.post("/pairs/{number}")
async def choose(request: Request, front: Visited, number: str) -> dict[str, bool]:
    """Note a choice, once for each pair."""
    choice = parsed(Choice, await body(request, 1)).choice
    if not await asyncio.to_thread(lambda: votes(front).choose(number, choice)):
        raise HTTPException(409, "this pair is not known, or was chosen from before")
    return {"noted": True}


def shown(name: str) -> str:
    """What people are told of a name in the file of choices."""
    return label(name.removeprefix(BASE)) or "base"  # of choices that an earlier version of this package noted


@router.get("/results")
async def results(request: Request, front: Visited) -> Response:
    """What the choices add up to."""
    standings = await asyncio.to_thread(lambda: votes(front).standings())
    named = [s._replace(model=shown(s.model), other=shown(s.other)) for s in standings]
    return page(request, "results", standings=named)
