"""A configuration from a YAML file and dotted overrides, and back to YAML."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flowbp_ray.config.errors import ConfigError, sentences
from flowbp_ray.config.schema import AlignConfig


def load(path: Path, overrides: Sequence[str], more: Sequence[Path] = ()) -> AlignConfig:
    """The configuration of a YAML file, changed by ``more`` files, setting by setting, and then by overrides such as
    ``train.steps=20`` (the last one wins).

    Values are read as YAML; ``reward.components.0.weight=2`` reaches into a list. ConfigError if any of it is wrong.
    """
    data = settings([path, *more], overrides)
    try:
        return AlignConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(sentences(error, AlignConfig, data)) from error
    except OSError as error:  # of a path in it: no permission, too long a name
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error


def settings(files: Sequence[Path], overrides: Sequence[str]) -> dict[Any, Any]:
    """What files and overrides say, as `load` puts them together, whatever it is. ConfigError where they cannot be read."""
    data: dict[Any, Any] = {}
    for file in files:
        data = _merged(data, _read(file))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is no override: write section.setting=value, as in train.steps=20")
        data = _changed(data, key.split("."), _parse(value, repr(override)), override)
    return data


def dump(config: AlignConfig) -> str:
    """The whole configuration as YAML, defaults and all; loading it gives an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "" if path.suffix in (".yaml", ".yml") else "; a single setting is written section.setting=value"
        raise ConfigError(f"there is no configuration {path.absolute()}{hint}") from error
    except IsADirectoryError as error:
        files = ", ".join(sorted(f.name for f in path.iterdir() if f.suffix in (".yaml", ".yml")))
        raise ConfigError(f"{path.absolute()} is a folder: name a file in it ({files or 'it has no .yaml files'})") from error
    except OSError as error:
        raise ConfigError(f"{path.absolute()} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.absolute()} is not text in UTF-8") from error
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} has to consist of sections such as 'train:' with 'setting: value' below them")
    if "applications" in data:
        raise ConfigError(f"{path} is for Ray Serve (it has applications), and no configuration: start it by serve run {path}")
    if data.keys() >= {"apiVersion", "kind"}:
        raise ConfigError(
            f"{path} is for Kubernetes (it has apiVersion and kind), and no configuration: start it by kubectl apply -f {path}"
        )
    return data


def _merged(node: Any, other: Any) -> Any:
    """The node with what the other one has: sections setting by setting, all else as a whole."""
    if not (isinstance(node, dict) and isinstance(other, dict)):
        return other
    return node | {key: _merged(node.get(key), value) for key, value in other.items()}


def _changed(node: Any, names: list[str], value: Any, override: str) -> Any:
    """A copy of the node with the value at the names' place."""
    if not names:
        return value
    first, rest = names[0], names[1:]
    match node:
        case dict() | None:
            inside = node or {}
            return inside | {first: _changed(inside.get(first), rest, value, override)}
        case list():
            if not first.isdecimal() or int(first) >= len(node):
                key = override.partition("=")[0].split(".")
                where = ".".join(key[: len(key) - len(names)])
                items = [
                    f"{where}.{i}" + (f" ({item['name']})" if isinstance(item, dict) and "name" in item else "")
                    for i, item in enumerate(node)
                ]
                what = f"a list: write {' or '.join(items)}" if items else f"an empty list: give the whole of it, {where}=[…]"
                raise ConfigError(f"{override!r}: {where} is {what}")
            return [_changed(item, rest, value, override) if i == int(first) else item for i, item in enumerate(node)]
    raise ConfigError(f"{override!r}: {first} cannot be set inside {node!r}, which is a value and not a section")


class _Loader(yaml.SafeLoader):
    """Plain YAML, but a key that stands twice is an error instead of the last one winning."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value} appears twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads; without double quotes YAML's odder line breaks (next line, U+2028) would become others."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


# YAML 1.1, PyYAML's dialect, reads 1e-3 as text. Everybody who writes it means a number.
for _dialect in (_Loader, _Dumper):
    _dialect.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: invalid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # unprintable characters; a date of no calendar
        raise ConfigError(f"{where}: invalid YAML: {str(error).splitlines()[0]}") from error
