"""What imports what: data flows down the rooms, and nothing imports upward."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: The rooms of hijack/, low to high; a module imports from its own room and those
#: before it. "public" gathers the public names, "hijack" is the package itself.
ROOMS = (
    "errors",
    "imports",
    "dtypes",
    "text",
    "options",
    "progress",
    "metrics",
    "patching",
    "claim",
    "hooks",
    "scheme",
    "registry",
    "kernels",
    "decoded",
    "recompute",
    "requantizing",
    "staging",
    "quantized",
    "stored",
    "offloading",
    "sharding",
    "collectives",
    "resharding",
    "safetensors_io",
    "formats",
    "naming",
    "module_names",
    "device_map",
    "unsaved_tensors",
    "model_families",
    "layer_kinds",
    "selection",
    "modules",
    "wrap",
    "loading",
    "saving",
    "lora",
    "checkpoint",
    "hosts",
    "public",
    "hijack",
    "testing",
    "schemes",
    "cli",
    "__main__",
)


def modules_of(root):
    """Dotted name to file, of both packages."""
    files = [
        path for name in ("hijack", "schemes") for path in (root / name).rglob("*.py")
    ]
    names = [path.relative_to(root).with_suffix("").parts for path in files]
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): path
        for parts, path in zip(names, files, strict=True)
    }


def imports_of(path):
    """Full names a file imports when it runs, also within functions.

    What stands under ``if TYPE_CHECKING`` never runs.
    """
    tree = ast.parse(path.read_text("utf-8"))
    unread = [n for n in ast.walk(tree) if isinstance(n, ast.If) and _is_typing(n.test)]
    left_out = {id(n) for block in unread for s in block.body for n in ast.walk(s)}
    names = []
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            names += [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [(node.module, f"{node.module}.{a.name}") for a in node.names]
    return names


def _is_typing(test):
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def graph_of(root):
    """Module to those of our own modules that it imports."""
    files = modules_of(root)
    return {
        name: {
            full if full in files else module
            for module, full in imports_of(path)
            if full in files or module in files
        }
        - {name}
        for name, path in files.items()
    }


def room_of(module):
    """The room a module is in."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or package if package == "hijack" else package


def upward(graph, rooms):
    """Imports of rooms that are higher, in words; unknown rooms are the highest."""
    height = {room: number for number, room in enumerate(rooms)}
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if height.get(room_of(other), len(rooms)) > height.get(room_of(module), -1)
    ]


def circles(graph):
    """Modules that import themselves in the end, with the way they do."""
    found, finished = [], set()

    def visit(module, way):
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in finished:
            for other in sorted(graph[module]):
                visit(other, [*way, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_nothing_imports_upward():
    """Every module is in a room, and imports from it and from lower ones."""
    graph = graph_of(ROOT)
    assert {room_of(module) for module in graph} == set(ROOMS)
    assert upward(graph, ROOMS) == []


def test_no_imports_are_circular():
    """Those within functions count, for they hide circles."""
    assert circles(graph_of(ROOT)) == []


def test_the_contract_needs_pluggy_alone():
    """`hijack.hooks` is the hook specifications; types are for readers."""
    imported = {module for module, _ in imports_of(ROOT / "hijack" / "hooks.py")}
    assert imported == {"__future__", "typing", "pluggy"}


def test_one_module_asks_plugins():
    """Only the contract and the registry know pluggy."""
    users = {
        name
        for name, path in modules_of(ROOT).items()
        if any(module.partition(".")[0] == "pluggy" for module, _ in imports_of(path))
    }
    assert users == {"hijack.hooks", "hijack.registry"}


@pytest.fixture
def house(tmp_path):
    """A house with a circle, and with an import upward in a function."""
    files = {
        "hijack/__init__.py": "from hijack.low import one\n",
        "hijack/low.py": "def one():\n    from hijack.high import two\n",
        "hijack/high/__init__.py": "import hijack.high.inner\nfrom os import path\n",
        "hijack/high/inner.py": (
            "from typing import TYPE_CHECKING\n"
            "from hijack import high\n"
            "if TYPE_CHECKING:\n    import schemes.mine\n"
        ),
        "schemes/mine.py": "import hijack\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_house_in_disorder_is_seen(house):
    """The tests above can fail."""
    graph = graph_of(house)
    assert graph["hijack.low"] == {"hijack.high"}
    assert upward(graph, ("low", "high", "hijack", "schemes")) == [
        "hijack.low imports hijack.high"
    ]
    assert upward(graph, ("low", "hijack", "schemes")) == [
        "hijack.high imports hijack.high.inner",
        "hijack.high.inner imports hijack.high",
        "hijack.low imports hijack.high",
    ]
    assert circles(graph) == ["hijack.high -> hijack.high.inner -> hijack.high"]
