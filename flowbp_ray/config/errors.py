"""Pydantic's findings as sentences that say what is wrong, where, and what to do."""

import reprlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flowbp_ray.config.section import IN_WORDS

#: What a value has to be, by pydantic's name for its being something else.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes if it looks like something else)",
    "string_too_short": "text that is not empty",
    "is_instance_of": "a path",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "model_type": "a section of settings",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of}",
}

#: Added where neither model nor surrogate is given.
RECIPE = "; placements and other files of changes come after a recipe, such as configs/shapes/sparse.yaml"


class ConfigError(Exception):
    """A configuration that cannot be run; its text is one or several sentences, one a line."""


def sentences(error: ValidationError, root: type[BaseModel], data: dict[Any, Any]) -> str:
    """All that is wrong with the ``data`` of what should be a ``root``, one a line."""
    return "\n".join(_sentence(found, root, data) for found in error.errors(include_url=False))


def _sentence(found: ErrorDetails, root: type[BaseModel], data: dict[Any, Any]) -> str:
    kind, context = found["type"], found.get("ctx", {})
    if not found["loc"]:
        return str(context["error"])  # from a validator of the whole, which names the settings itself
    parent, models = _locate(found["loc"][:-1], root)
    name = found["loc"][-1]
    path, here = _locate(found["loc"], root)
    where = ".".join(path)
    if kind == "extra_forbidden":
        owners = [_method(m) for m in _locate(parent, root)[1] if name in m.model_fields]  # of a section that has this method
        if owners:
            own = ", ".join(n for n in models[0].model_fields if n != "method")
            return f"{where} belongs to {', '.join(owners)}; {_method(models[0])} has {own}: remove it"
        return f"{where} is no setting: {_nearest(parent, str(name), models, _names(root, data))}"
    if kind in ("missing", "union_tag_not_found") and len(here) > 1:
        recipe = "" if data.keys() & {"model", "surrogate"} else RECIPE
        return f"{where}.method is missing: set it to one of {', '.join(map(_method, here))}{recipe}"
    if kind == "missing":
        return f"{where} is missing{_wanted(where, name, models)}"
    if kind == "value_error":
        return f"{where}: {context['error']}"
    if kind == "union_tag_invalid":
        return f"{where}.method must be one of {context['expected_tags']}, not {_given(context['tag'])}"
    if kind == "string_pattern_mismatch":
        return f"{where} must be {IN_WORDS[context['pattern']]}, not {_given(found['input'])}"
    if kind in EXPECTED:
        return f"{where} must be {EXPECTED[kind].format(**context)}, not {_given(found['input'])}"
    return f"{where}: {found['msg']}, not {_given(found['input'])}"


def _locate(place: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """The place as it is written in an override, and the section that is there (several where a method is to be chosen)."""
    path: list[str] = []
    models = [root]
    for part in place:
        tagged = [m for m in models if part == _method(m)] if len(models) > 1 else []
        if tagged:  # pydantic puts the method's name into the place of a finding
            models = tagged
            continue
        path.append(str(part))
        if isinstance(part, str):
            models = [n for m in models if part in m.model_fields for n in _sections(m.model_fields[part].annotation)]
    return path, models


def _method(section: type[BaseModel]) -> str:
    """Which method the settings of a section are of."""
    (name,) = get_args(section.model_fields["method"].annotation)
    return str(name)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type: itself, a list's, or a union's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _sections(part)


def _nearest(parent: list[str], name: str, models: list[type[BaseModel]], names: Iterator[str]) -> str:
    """What an unknown key may have been meant to be: one beside it, else one in another section."""
    beside = list(dict.fromkeys(field for m in models for field in m.model_fields))
    if close := get_close_matches(name, beside, n=1):
        return f"did you mean {'.'.join([*parent, close[0]])}?"
    elsewhere = {path.rpartition(".")[2]: path for path in names}
    if close := get_close_matches(name, elsewhere, n=1):
        return f"did you mean {elsewhere[close[0]]}?"
    return f"{'.'.join(parent) or 'the configuration'} has {', '.join(beside)}"


def _names(model: type[BaseModel], data: Any, prefix: str = "") -> Iterator[str]:
    """The settings that there are, with the method that the data choose."""
    for name, field in model.model_fields.items():
        yield prefix + name
        given = data.get(name) if isinstance(data, dict) else None
        sections = [] if get_origin(field.annotation) is tuple else list(_sections(field.annotation))
        if len(sections) > 1:
            sections = [s for s in sections if isinstance(given, dict) and given.get("method") == _method(s)]
        for section in sections:
            yield from _names(section, given, f"{prefix}{name}.")


def _wanted(where: str, name: int | str, models: list[type[BaseModel]]) -> str:
    """What has to be given: the settings of a section that have no default, or what the setting is."""
    for field in (m.model_fields[name] for m in models if name in m.model_fields and isinstance(name, str)):
        required = [f"{where}.{n}" for s in _sections(field.annotation) for n, f in s.model_fields.items() if f.is_required()]
        if required and get_origin(field.annotation) is not tuple:
            return f": set {', '.join(dict.fromkeys(required))}"
        if field.description:
            meaning = " ".join(field.description.rstrip(".").replace("``", "'").split())
            return f": {meaning[0].lower()}{meaning[1:]}"
    return ""


def _given(value: object) -> str:
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
    return reprlib.repr(value)
