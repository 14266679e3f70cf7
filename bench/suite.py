"""The suite file: what to compare. Reading and checking it, torch-free.

`read_suite` tells *all* mistakes of a file at once, each with its path, the problem and the value.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bench.cell import AXES, LIMITS, SETTINGS, STRICT, Count, LoraRank, Name, Nodes, Positive, Processes, validate_settings
from bench.checkout import package_folder
from bench.errors import Mistake, SuiteError, UserError

MOST_LETTERS = 64
"""Of a suite's name."""
LARGEST_SUITE_BYTES = 1 << 20


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Axes:
    """The dimensions of the matrix; the product of all of them is planned."""

    stage: Annotated[list[Name], Field(min_length=1)]
    model: Annotated[list[Name], Field(min_length=1)]
    strategy: Annotated[list[Name], Field(min_length=1)]
    lora_rank: Annotated[list[LoraRank], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0])
    """0 is full fine-tuning."""
    nodes: Annotated[list[Nodes], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [1])
    processes_per_node: Annotated[list[Processes], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [1])


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Override:
    """Settings for the cells that match `when`; later overrides win."""

    when: dict[str, Any]
    """Axis -> value or list of values."""
    settings: dict[str, Any]


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Limits:
    """When the supervisor and the readers give up."""

    timeout_seconds: Positive = 3600.0
    """Longest life of a trial."""
    heartbeat_seconds: Positive = 300.0
    """Longest silence of a rank."""
    rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of malformed rows in a data file."""
    side_by_side: Count = 1
    """Trials of a block that run at once and share devices: quick for parity and evidence; above 1 no time or memory is claimed."""

    @property
    def shares_devices(self) -> bool:
        """Whether other trials may run beside one, on the same devices."""
        return self.side_by_side > 1


@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite file, checked. `settings`, `stages`, `overrides` and the cell are merged in this order."""

    suite: Annotated[str, Field(pattern=rf"^[a-z0-9][a-z0-9._-]{{0,{MOST_LETTERS - 1}}}$")]
    """Name; the folder under results/."""
    description: str = ""
    axes: Axes
    trials: Count = 1
    """Repetitions of every cell; trial k uses seed base_seed + k."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For every stage."""
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """For one stage: {sft: {...}, rm: {...}, ppo: {...}}."""
    overrides: list[Override] = dataclasses.field(default_factory=list)
    include: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """More cells: every axis with one value, and `settings`."""
    exclude: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Cells to leave out: axis -> value or list of values."""
    limits: Limits = dataclasses.field(default_factory=Limits)


class Known(NamedTuple):
    """The names that a suite may use; they come from the layers above this one."""

    strategies: tuple[str, ...]
    model_problem: Callable[[str], str | None]
    data_problem: Callable[[str, Path], str | None]


_adapter = TypeAdapter(Suite)


def read_suite(path: Path, known: Known) -> Suite:
    """Return the suite in `path`. Raises SuiteError with every mistake, or UserError if the file cannot be read."""
    return check_suite(_with_absolute_files(load_yaml(path), path.parent.absolute()), str(path), known, folder=path.parent)


def check_suite(content: Any, source: str, known: Known, folder: Path) -> Suite:
    """Return the suite that `content` describes. Raises SuiteError with every mistake found."""
    if not isinstance(content, dict):
        raise SuiteError(source, [Mistake("(file)", "a suite is a mapping with the keys suite, axes, ...", _short(content))])
    mistakes = _name_mistakes(content, known)
    suite = None
    try:
        suite = _adapter.validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        told = {mistake.path for mistake in mistakes}
        mistakes += [mistake for mistake in _from_pydantic(error, "") if mistake.path not in told]
    mistakes += _setting_mistakes(content, known, folder)
    if mistakes or suite is None:
        raise SuiteError(source, sorted(set_of_mistakes(mistakes)))
    return suite


def set_of_mistakes(mistakes: list[Mistake]) -> list[Mistake]:
    """Drop repeated mistakes (same path and problem) and make their values printable, in order."""
    unique: dict[tuple[str, str], Mistake] = {}
    for mistake in mistakes:
        unique.setdefault((mistake.path, mistake.problem), mistake._replace(value=_short(mistake.value)))
    return list(unique.values())


def matches(axes: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    """Whether `axes` (axis -> value) has for each axis in `pattern` its value, or one of its values."""
    return all(axes[axis] in wanted if isinstance(wanted, list) else axes[axis] == wanted for axis, wanted in pattern.items())


def settings_for(suite: Suite, axes: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Merge the settings of `suite` for one cell; `extra` are an included cell's own."""
    return {key: value for _, settings in (*_layers(suite, axes), ("", extra or {})) for key, value in settings.items()}


def place_of_setting(suite: Suite, axes: Mapping[str, Any], key: str) -> str | None:
    """Where in the file the value of the setting `key` stands that a cell gets; None if it keeps its default."""
    return next((f"{path}.{key}" for path, settings in reversed(list(_layers(suite, axes))) if key in settings), None)


def _layers(suite: Suite, axes: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, settings) of every place that gives settings to a cell; later ones win."""
    yield "settings", suite.settings
    yield f"stages.{axes['stage']}", suite.stages.get(axes["stage"], {})
    for i, override in enumerate(suite.overrides):
        if matches(axes, override.when):
            yield f"overrides[{i}].settings", override.settings


# -- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error and 2e-5 is a number."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    content: dict[Any, Any] = {}
    yield content
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"a key is not text: {key!r}", key_node.start_mark)
        if key in content:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        content[key] = None
    content.update(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises UserError for what is no readable, finite YAML text."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file; give the path of a suite, for example config/quickstart.yaml")
    if not path.is_file():
        raise UserError(f"{path}: a suite is a YAML file; seen: a folder or device")
    if path.stat().st_size > LARGEST_SUITE_BYTES:
        raise UserError(f"{path}: a suite has at most {LARGEST_SUITE_BYTES} bytes; seen: {path.stat().st_size}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a suite is a YAML text file") from None
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        text = " ".join(str(error).split()).replace("found unconstructable recursive node", "an alias contains itself")
        raise UserError(f"{path}: not YAML that a suite can be: {text}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a suite") from None
    if _written_out(content, {}) > LARGEST_SUITE_BYTES:
        raise UserError(f"{path}: its aliases stand for more than {LARGEST_SUITE_BYTES} values; a suite is a small tree")
    return content


def _written_out(content: Any, known: dict[int, int]) -> int:
    """Number of values in `content` if every alias were written out (few lines of aliases can mean billions of values)."""
    if not isinstance(content, (dict, list)):
        return 1
    if id(content) not in known:
        children = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(content)]


def _with_absolute_files(content: Any, folder: Path) -> Any:
    """`content` with every `file:PATH` and overlay made absolute: a relative one is meant from the suite's own folder."""
    if isinstance(content, dict):
        content = {key: _absolute_values(value, folder) if key == "overlay" else value for key, value in content.items()}
        return {key: _with_absolute_files(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_absolute_files(value, folder) for value in content]
    if isinstance(content, str) and content.startswith("file:") and len(content) > len("file:"):
        return f"file:{_absolute(content.removeprefix('file:'), folder)}"
    return content


def _absolute_values(overlay: Any, folder: Path) -> Any:
    if not isinstance(overlay, dict):
        return overlay
    return {key: _absolute(path, folder) if path and isinstance(path, str) else path for key, path in overlay.items()}


def _absolute(path: str, folder: Path) -> str:
    """`path` from `folder` on; one in a home folder that there is not stays as it is, for those who look for it to tell."""
    home = os.path.expanduser(path)  # noqa: PTH111 (Path's own raises a RuntimeError)
    return home if home.startswith("~") else str(folder / home)


def _short(value: Any) -> Any:
    return value if len(repr(value)) <= 200 else repr(value)[:197] + "..."


# -- checking ----------------------------------------------------------------------------------------------------


_WORDS = {
    "unexpected_keyword_argument": "unknown key",
    "missing": "missing",
    "missing_keyword_only": "missing",
    "too_short": "at least one value is needed",
}
"""pydantic's kinds of mistakes that have plainer words."""


def _from_pydantic(error: ValidationError, prefix: str) -> list[Mistake]:
    mistakes = []
    for item in error.errors():
        path = prefix
        for part in item["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        problem = _WORDS.get(item["type"], item["msg"])
        mistakes.append(Mistake(path, problem, None if problem == "missing" else item["input"]))
    return mistakes


def _near(name: object, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(names)}"


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _axes_seen(content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, axis, value) for every axis value in axes, include, exclude and overrides."""
    places: list[tuple[str, Any]] = [("axes", content.get("axes"))]
    for key in ("include", "exclude"):
        places += [(f"{key}[{i}]", item) for i, item in enumerate(_listed(content.get(key) or []))]
    places += [
        (f"overrides[{i}].when", item.get("when"))
        for i, item in enumerate(_listed(content.get("overrides") or []))
        if isinstance(item, dict)
    ]
    for place, mapping in places:
        if not isinstance(mapping, dict):
            continue
        for axis, values in mapping.items():
            if place.startswith("include") and axis == "settings":
                continue
            if axis not in AXES:
                yield f"{place}.{axis}", "", axis
            if place.startswith("include") and isinstance(values, list):
                yield f"{place}.{axis}", "list", values
                continue
            for i, value in enumerate(_listed(values) if axis in AXES else []):
                yield f"{place}.{axis}[{i}]" if isinstance(values, list) else f"{place}.{axis}", axis, value


def _axis_problem(path: str, axis: str, value: Any, known: Known) -> str | None:
    """What is wrong with one value on an axis; "" is what is none, "list" a list where a cell is included."""
    if axis == "":
        return None if path.startswith("axes") else f"unknown axis, {_near(value, AXES)}"
    if axis == "list":
        return "a cell that is included has one value on each axis, not a list of them"
    if axis in LIMITS:
        least, most = LIMITS[axis]
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return None if fits else f"{axis} is a whole number from {least} to {most}"
    if not isinstance(value, str):
        return f"{axis} is a name, as text"
    if axis == "model":
        return known.model_problem(value)
    names = tuple(SETTINGS) if axis == "stage" else known.strategies
    return None if value in names else f"unknown {axis}, {_near(value, names)}"


def _name_mistakes(content: dict[str, Any], known: Known) -> list[Mistake]:
    mistakes = [
        Mistake(path, problem, value) for path, axis, value in _axes_seen(content) if (problem := _axis_problem(path, axis, value, known))
    ]
    axes = content.get("axes")
    for axis, values in axes.items() if isinstance(axes, dict) else ():
        if isinstance(values, list) and len({repr(value) for value in values}) < len(values):
            mistakes.append(Mistake(f"axes.{axis}", "a value stands twice", values))
    for i, item in enumerate(_listed(content.get("include") or [])):
        missing = [axis for axis in ("stage", "model", "strategy") if isinstance(item, dict) and axis not in item]
        mistakes += [Mistake(f"include[{i}].{axis}", "missing", None) for axis in missing]
    for stage in content.get("stages") or {} if isinstance(content.get("stages"), dict) else ():
        if stage not in SETTINGS:
            mistakes.append(Mistake(f"stages.{stage}", f"unknown stage, {_near(stage, tuple(SETTINGS))}", stage))
    return mistakes


def _stages_of(content: dict[str, Any]) -> list[str]:
    stages = [value for path, axis, value in _axes_seen(content) if axis == "stage" and path.startswith(("axes", "include"))]
    return [stage for stage in SETTINGS if stage in stages]


def _setting_layers(content: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield (path, stages whose settings it must fit, settings) for every place that gives settings."""
    used = tuple(_stages_of(content))
    yield "settings", used, content.get("settings") or {}
    stages = content.get("stages")
    for stage, settings in stages.items() if isinstance(stages, dict) else ():
        if stage in SETTINGS:
            yield f"stages.{stage}", (stage,), settings or {}
    for i, item in enumerate(_listed(content.get("overrides") or [])):
        if isinstance(item, dict):
            when = item.get("when")
            wanted = _listed(when["stage"]) if isinstance(when, dict) and "stage" in when else list(used)
            yield f"overrides[{i}].settings", tuple(stage for stage in SETTINGS if stage in wanted), item.get("settings") or {}
    for i, item in enumerate(_listed(content.get("include") or [])):
        if isinstance(item, dict) and item.get("stage") in tuple(SETTINGS):
            yield f"include[{i}].settings", (item["stage"],), item.get("settings") or {}


def _setting_mistakes(content: dict[str, Any], known: Known, folder: Path) -> list[Mistake]:
    mistakes = []
    for path, stages, settings in _setting_layers(content):
        if not isinstance(settings, dict):
            mistakes.append(Mistake(path, "settings are a mapping", settings))
            continue
        for stage in stages:
            mistakes += _layer_mistakes(path, stage, settings)
        mistakes += _data_mistakes(path, settings, known, folder)
        mistakes += _overlay_mistakes(path, settings)
    return mistakes


def _layer_mistakes(path: str, stage: str, settings: dict[str, Any]) -> list[Mistake]:
    names = tuple(field.name for field in dataclasses.fields(SETTINGS[stage]))
    mistakes = [
        Mistake(f"{path}.{key}", f"unknown setting of {stage}, {_near_setting(key, names)}", settings[key])
        for key in settings
        if key not in names
    ]
    try:
        validate_settings(stage, {key: value for key, value in settings.items() if key in names})
    except ValidationError as error:
        mistakes += _from_pydantic(error, path)
    return mistakes


def _near_setting(key: object, names: tuple[str, ...]) -> str:
    if key in AXES:
        return "an axis: it goes under axes"
    close = difflib.get_close_matches(str(key), names, n=1)
    return f"did you mean {close[0]!r}?" if close else "see `coati-bench schema suite`"


def _data_mistakes(path: str, settings: dict[str, Any], known: Known, folder: Path) -> list[Mistake]:
    mistakes = []
    for key in ("data", "ptx"):
        name = settings.get(key)
        if isinstance(name, str) and not (key == "ptx" and name == "none") and (problem := known.data_problem(name, folder)):
            mistakes.append(Mistake(f"{path}.{key}", problem, name))
    return mistakes


def _overlay_mistakes(path: str, settings: dict[str, Any]) -> list[Mistake]:
    overlay = settings.get("overlay")
    checkout = overlay.get("colossalai") if isinstance(overlay, dict) else None
    if not checkout or not isinstance(checkout, str):
        return []
    try:
        package_folder(Path(checkout), "colossalai")
    except UserError as error:
        return [Mistake(f"{path}.overlay.colossalai", str(error), checkout)]
    return []


def suite_schema() -> dict[str, Any]:
    """JSON Schema of a suite file, the settings of every stage included."""
    schema = _adapter.json_schema()
    for stage, kind in SETTINGS.items():
        settings = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions = schema.setdefault("$defs", {})
        definitions.update(settings.pop("$defs", {}))
        definitions[kind.__name__] = {**settings, "required": []}
        schema["properties"]["stages"].setdefault("properties", {})[stage] = {"$ref": f"#/$defs/{kind.__name__}"}
    schema["properties"]["stages"]["additionalProperties"] = False
    return schema
