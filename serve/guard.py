"""What every HTTP service here has: who may ask, and how much a request may be."""

import os
import secrets
from typing import TypeVar

from fastapi import HTTPException, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, NonNegativeFloat, PositiveInt, ValidationError

from flowbp_ray.config import paths
from flowbp_ray.config.section import Section

TOKEN = "FLOWBP_TOKEN"
Kind = TypeVar("Kind", bound=BaseModel)

bearer = HTTPBearer(auto_error=False)  # what the description says of it; a replica looks at the token itself


class Guarded(Section):
    """The part of an application's ``args`` that is about HTTP."""

    fronts: PositiveInt = 1
    """Processes that answer HTTP."""
    front_cpus: NonNegativeFloat = 0.1
    """CPUs for each of these."""
    max_megabytes: PositiveInt = 32
    """The largest request's body."""
    token_file: paths.AbsolutePath | None = None
    """A file with the token that requests have to bear; null takes the environment variable FLOWBP_TOKEN of these processes."""
    open: bool = False
    """Answer everybody, without a token."""


def token(settings: Guarded, what: str) -> str | None:
    """The token that requests have to bear; None where all are answered. ValueError, naming ``what``, if there is neither."""
    if settings.open:
        return None
    try:
        found = settings.token_file.read_text("utf-8") if settings.token_file else os.environ.get(TOKEN, "")
    except OSError as error:
        raise ValueError(f"the {what}'s token_file {settings.token_file} cannot be read: {error.strerror}") from error
    if not found.strip():
        source = settings.token_file or f"the environment variable {TOKEN}"
        raise ValueError(f"{source} has no token for the {what}: give one, or set open to true to answer everybody")
    return found.strip()


def entitled(request: Request, expected: str | None) -> None:
    """401 unless the request bears the token, if one is expected."""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if expected is not None and (kind.lower() != "bearer" or not secrets.compare_digest(given.encode(), expected.encode())):
        raise HTTPException(401, "send the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"})


def parsed(kind: type[Kind], content: bytes, status: int = 400) -> Kind:
    """A JSON body as what it should be; else the ``status``, and a sentence that says what is wrong with it."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        where = [f"{'.'.join(map(str, e['loc'])) or 'the body'}: {e['msg']}" for e in error.errors()[:5]]
        raise HTTPException(status, "; ".join(where)) from error


async def body(request: Request, most: int) -> bytes:
    """The request's body; 413 as soon as it has more than so many megabytes."""
    got = bytearray()
    async for chunk in request.stream():
        got += chunk
        if len(got) > most * 2**20:
            raise HTTPException(413, f"a request has at most {most} megabytes")
    return bytes(got)
