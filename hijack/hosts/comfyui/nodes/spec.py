"""What a node is, and how either of ComfyUI's schemas says so."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

#: Least and greatest value of a number.
Limits = tuple[float, float]
#: Values a node sees of the workflow it runs in, by argument name.
HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


@dataclasses.dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: of the argument.
        kind: ComfyUI's type, such as ``MODEL``; ``COMBO`` is a choice of ``options``.
        tooltip: what it does, for the page; a function is asked whenever that is
            loaded.
        options: choices of a combo, asked for whenever the page is loaded.
        default: value to start with, where there is one.
        multiline: whether a text may have several lines.
        optional: whether it may be left open.
        free: whether a combo also takes texts that are no choice of it.
        limits: least and greatest value of a number; may be a function, too.
        step: by which the page changes a number that is not whole.
        advanced: whether the page shows it only on request, where it can.
    """

    name: str
    kind: str
    tooltip: str | Callable[[], str]
    options: Callable[[], Sequence[str]] | None = None
    default: Any = None
    multiline: bool = False
    optional: bool = False
    free: bool = False
    limits: Limits | Callable[[], Limits] | None = None
    step: float | None = None
    advanced: bool = False

    def details(self) -> dict[str, Any]:
        """What both schemas call the same."""
        text = self.tooltip() if callable(self.tooltip) else self.tooltip
        details: dict[str, Any] = {"tooltip": text}
        if self.default is not None:
            details["default"] = self.default
        if self.multiline:
            details["multiline"] = True
        limits = self.limits() if callable(self.limits) else self.limits
        if limits is not None:
            details["min"], details["max"] = limits
        if self.step is not None:
            details["step"] = self.step
        if self.advanced:
            details["advanced"] = True
        return details

    def takes(self, received: Any) -> bool:
        """Whether an output of a type may be linked to it.

        Args:
            received: ComfyUI's type; the old schema has a list for a combo.
        """
        kinds = {"COMBO"} if isinstance(received, list) else set(received.split(","))
        return bool(kinds & {"*", self.kind, *(["STRING"] if self.free else [])})


@dataclasses.dataclass(frozen=True)
class Output:
    """One output: ComfyUI's type, a name and a tooltip."""

    kind: str
    name: str
    tooltip: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What a node's function returns.

    Attributes:
        values: one for each output.
        text: shown in the node on the page.
    """

    values: tuple[Any, ...] = ()
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: unique among all packs.
        title: what people see.
        description: tooltip of the node.
        aliases: other words people search for.
        inputs: in the order of the function's arguments.
        outputs: in the order of the result's values.
        run: the function; it takes inputs by name, and those of `HIDDEN` it names.
        terminal: whether it is run for its own sake.
        fingerprint: given the inputs by name, what else the result depends on, such as
            a file; ComfyUI runs the node again when it changes. None if on nothing.
    """

    id: str
    title: str
    description: str
    aliases: tuple[str, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    run: Callable[..., Result]
    terminal: bool = False
    fingerprint: Callable[..., Any] | None = None
    category: str = "hijack"

    @property
    def hidden(self) -> tuple[str, ...]:
        """Names of `HIDDEN` that the function takes."""
        accepted = inspect.signature(self.run).parameters
        return tuple(name for name in HIDDEN if name in accepted)


# -- classic ---------------------------------------------------------------------------


def classic_class(node: Node) -> type:
    """A class as ``NODE_CLASS_MAPPINGS`` wants it."""

    def input_types(cls: type) -> dict[str, Any]:
        types: dict[str, Any] = {"required": {}, "optional": {}}
        for given in node.inputs:
            kind = given.kind if given.options is None else list(given.options())
            group = types["optional" if given.optional else "required"]
            group[given.name] = (kind, given.details())
        types["hidden"] = {name: HIDDEN[name] for name in node.hidden}
        return types

    def run(self: object, **arguments: Any) -> Any:
        result = node.run(**arguments)
        if result.text is None:
            return result.values
        return {"ui": {"text": (result.text,)}, "result": result.values}

    namespace = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(output.kind for output in node.outputs),
        "RETURN_NAMES": tuple(output.name for output in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(output.tooltip for output in node.outputs),
        "FUNCTION": "run",
        "OUTPUT_NODE": node.terminal,
        "CATEGORY": node.category,
        "DESCRIPTION": node.description,
        "SEARCH_ALIASES": list(node.aliases),
        "run": run,
        "__doc__": node.description,
    }
    if any(given.free for given in node.inputs):
        namespace["VALIDATE_INPUTS"] = classmethod(_validation(node))
    if node.fingerprint is not None:
        namespace["IS_CHANGED"] = classmethod(_fingerprint(node.fingerprint))
    return type(node.id, (), namespace)


def _fingerprint(fingerprint: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a node's class; it is given what the node's inputs are linked to."""

    def ask(cls: Any, /, **inputs: Any) -> Any:
        known = inspect.signature(fingerprint).parameters
        return fingerprint(**{k: v for k, v in inputs.items() if k in known})

    return ask


def _validation(node: Node) -> Callable[..., Any]:
    """A method of a node's class, which ComfyUI asks instead of looking itself.

    It does so for the inputs that the method names, and for the types of what is linked
    to any input, because the method names those too.
    """

    def validate(cls: Any, /, **asked: Any) -> bool | str:
        linked = asked.get("input_types") or {}
        for given in node.inputs:
            received = linked.get(given.name)
            if received is not None and not given.takes(received):
                return f"{given.name}: got {received}, expected {given.kind}"
        return True

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["cls", *(i.name for i in node.inputs if i.free), "input_types"]
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    validate.__signature__ = signature  # type: ignore[attr-defined]
    return validate


# -- v3 --------------------------------------------------------------------------------


def has_v3() -> bool:
    """Whether this ComfyUI has the v3 schema."""
    try:
        latest = importlib.import_module("comfy_api.latest")
    except Exception:  # of another project, or half there
        return False
    return hasattr(latest, "ComfyExtension") and hasattr(latest, "io")


def extension(nodes: Sequence[Node]) -> Any:
    """A ``ComfyExtension`` with these nodes, for ``comfy_entrypoint``."""
    latest = importlib.import_module("comfy_api.latest")
    classes = [v3_class(node, latest) for node in nodes]

    class Extension(latest.ComfyExtension):  # type: ignore[misc,name-defined]
        async def get_node_list(self) -> list[Any]:
            return classes

    return Extension()


def v3_class(node: Node, latest: Any) -> type:
    """A class of ComfyUI's v3 schema."""
    io = latest.io

    def define_schema(cls: Any, /) -> Any:
        given = {
            "node_id": node.id,
            "display_name": node.title,
            "category": node.category,
            "description": node.description,
            "search_aliases": list(node.aliases),
            "inputs": [_v3_input(io, each) for each in node.inputs],
            "outputs": [
                io.Custom(output.kind).Output(
                    display_name=output.name, tooltip=output.tooltip
                )
                for output in node.outputs
            ],
            "hidden": [getattr(io.Hidden, name) for name in node.hidden],
            "is_output_node": node.terminal,
        }
        known = inspect.signature(io.Schema).parameters
        return io.Schema(**{k: v for k, v in given.items() if k in known})

    def execute(cls: Any, /, **arguments: Any) -> Any:
        for name in node.hidden:
            arguments[name] = getattr(cls.hidden, name, None)
        result = node.run(**arguments)
        shown = {} if result.text is None else {"ui": {"text": (result.text,)}}
        return io.NodeOutput(*result.values, **shown)

    namespace = {
        "define_schema": classmethod(define_schema),
        "execute": classmethod(execute),
        "__doc__": node.description,
    }
    if any(given.free for given in node.inputs):
        namespace["validate_inputs"] = classmethod(_validation(node))
    if node.fingerprint is not None:
        namespace["fingerprint_inputs"] = classmethod(_fingerprint(node.fingerprint))
    return type(node.id, (io.ComfyNode,), namespace)


def _v3_input(io: Any, given: Input) -> Any:
    kinds = {
        "COMBO": "Combo",
        "STRING": "String",
        "BOOLEAN": "Boolean",
        "INT": "Int",
        "FLOAT": "Float",
    }
    if given.kind in kinds:
        make = getattr(io, kinds[given.kind]).Input
    else:
        make = io.Custom(given.kind).Input
    details = {**given.details(), "optional": given.optional}
    if given.options is not None:
        details["options"] = list(given.options())
    known = inspect.signature(make).parameters
    if "advanced" not in known:  # in releases of 2025
        details.pop("advanced", None)
    return make(given.name, **details)
