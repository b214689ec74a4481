"""Print the page of all settings that an alignment has, docs/settings.md, made from the configuration's types and docstrings.

python -m pipelines.list_settings > docs/settings.md
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from typing import Any

from flowbp_ray.config import AlignConfig
from flowbp_ray.config.section import IN_WORDS
from flowbp_ray.config.surrogates import Surrogate
from flowbp_ray.surrogate.draws import PairDraw
from flowbp_ray.surrogate.methods import METHODS

BEGINNING = """\
# Settings

Settings are given in a YAML file, such as `configs/shapes/sparse.yaml`, in further YAML files that change it, such as those of
`configs/placement`, and as `section.setting=value` on the command line, where the last one given wins. `--dry-run` prints all of
them as a run would have them, and starts nothing.

A relative path is taken from the working directory. `python -m pipelines.list_settings` prints this page."""

BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "of at least",
    "exclusiveMaximum": "below",
    "maximum": "of at most",
    "multipleOf": "a multiple of",
}
SCHEMA = AlignConfig.model_json_schema()


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.list_settings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(page())


def page() -> str:
    """The page, without the last line's end."""
    parts = [BEGINNING]
    for name, of in SCHEMA["properties"].items():
        if "oneOf" in of:
            parts += surrogates(name)
        elif section := _section(of):
            parts.append(f"## {name}\n\n{_text(of.get('description', section['description']))}\n\n{_table(rows(section, name))}")
        else:
            parts.append(f"## {name}\n\n{_table(rows({'properties': {name: of}}))}")
    return "\n\n".join(parts)


def surrogates(name: str) -> list[str]:
    """What all methods have, a part for each one's own settings, and one for how a split is drawn."""
    shared = Surrogate.model_json_schema()
    shared["properties"]["method"] |= {"type": "string", "enum": list(METHODS)}
    parts = [f"## {name}\n\nSettings that every method has; those of each are below.\n\n{_table(rows(shared, name))}"]
    for method, of in METHODS.items():
        section = SCHEMA["$defs"][SCHEMA["properties"][name]["discriminator"]["mapping"][method].rpartition("/")[2]]
        own = {n: p for n, p in section["properties"].items() if n not in shared["properties"]}
        says = f"{sys.modules[of.settings.__module__].__doc__}".partition("\n\n")[0]
        title = f"### {name}.method={method}\n\n{_text(f'{says} {of.settings.__doc__}')}"
        parts.append(f"{title}\n\n{_table(rows(section | {'properties': own}, name, of.settings))}" if own else title)
    pair = SCHEMA["$defs"]["PairDraw"]
    return [*parts, f"### {name}.pair\n\n{_text(pair['description'])}\n\n{_table(rows(pair, f'{name}.pair', PairDraw))}"]


def rows(section: dict[str, Any], prefix: str = "", settings: type | None = None) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each setting of a section, and of the sections in it; ``settings`` is a class whose comments
    say what the settings mean, where the schema does not."""
    comments = _comments(settings) if settings else {}
    for name, of in section["properties"].items():
        path = f"{prefix}.{name}" if prefix else name
        default = "required" if name in section.get("required", ()) else f"`{json.dumps(of['default'], ensure_ascii=False)}`"
        meaning = _text(of.get("description") or comments[name])
        yield f"`{path}`", default.replace('`"', "`").replace('"`', "`"), " ".join([meaning, *_allowed(of)])
        if (inner := _section(of)) and not settings:
            yield from rows(inner, path)
        elif "$ref" in of.get("items", ()):
            yield from rows(_resolved(of["items"]), f"{path}.0")


def _section(of: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a setting is, if it is one, or null."""
    return next((_resolved(v) for v in of.get("anyOf", [of]) if "$ref" in v), None)


def _resolved(of: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = SCHEMA["$defs"][of["$ref"].rpartition("/")[2]]
    return found


def _comments(settings: type) -> dict[str, str]:
    """What the ``#:`` comments before a class's fields say."""
    found, lines = {}, list[str]()
    for line in map(str.strip, inspect.getsource(settings).splitlines()):
        if line.startswith("#:"):
            lines.append(line.removeprefix("#:"))
        elif lines:
            found[line.partition(":")[0]] = " ".join(lines)
            lines = []
    return found


def _allowed(of: dict[str, Any]) -> Iterator[str]:
    """A sentence about the values that a setting takes, where its type says more than the default."""
    null = ", or null" if "anyOf" in of else ""
    for kind in of.get("anyOf", [of]):
        match kind:
            case {"enum": [*words]}:
                yield f"One of {', '.join(f'`{w}`' for w in words)}{null}."
            case {"pattern": pattern}:
                yield f"It is {IN_WORDS[pattern]}{null}."
            case {"type": "integer" | "number" as number}:
                bounds = " and ".join(f"{word} {kind[key]:g}" for key, word in BOUNDS.items() if key in kind)
                if bounds:
                    yield f"A {'whole ' * (number == 'integer')}number {bounds}{null}."
            case {"type": "array", "minItems": least, **more}:
                many = f"{least}" if more.get("maxItems") == least else f"at least {least}"
                yield f"A list of {many}{null}."


def _text(doc: str) -> str:
    return " ".join(doc.replace("``", "`").replace("|", "\\|").split())


def _table(lines: Iterator[tuple[str, str, str]]) -> str:
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *(f"| {' | '.join(line)} |" for line in lines)])


if __name__ == "__main__":
    main()
