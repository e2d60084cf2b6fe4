"""What modules are called without adapters and wrappers, and in a checkpoint.

An adapter takes the place of a layer and keeps it as ``base_layer``; ``torch.compile``
and the like put words of their own into names. A checkpoint was written without them,
or has words before all names, such as ``model.diffusion_model``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from torch import nn

from hijack.naming.wrappers import plain
from hijack.safetensors_io.header import join

#: What adapters call the module they are for, as PEFT does.
ADAPTED = ("base_layer", "original_module")
#: What PEFT puts before the names of a whole model.
_PEFT = "base_model.model"


def adapter_parts(model: nn.Module) -> dict[str, str]:
    """The modules that adapters consist of, without the modules they are for.

    Args:
        model: any module.

    Returns:
        Name of each, and the name of the module it is an adapter of.
    """
    parts: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        adapted = next((word for word in ADAPTED if word in module._modules), None)
        if adapted is None:
            continue
        parts[name] = join(name, adapted)
        for word, child in module._modules.items():
            if word == adapted or child is None:
                continue
            for below, _ in child.named_modules(remove_duplicate=False):
                parts[join(join(name, word), below).rstrip(".")] = join(name, adapted)
    return parts


def base_name(name: str) -> str:
    """The name of a module without what adapters and wrappers put in it."""
    if name == _PEFT:
        return ""
    return plain(name.removeprefix(f"{_PEFT}."))


class LayerNames:
    """The layer of a checkpoint that each module of a model is.

    Names that are the same on both sides stay. If none is, the checkpoint may hold the
    model under a prefix; it is found if one prefix fits more layers than any other.

    Args:
        model: any module.
        layers: of the checkpoint: what comes before the last dot of its keys.

    Attributes:
        adapters: as `adapter_parts` gives them.
        prefix: what the checkpoint puts before all names.
    """

    def __init__(self, model: nn.Module, layers: Collection[str]) -> None:
        self.adapters = adapter_parts(model)
        self._layers = set(layers)
        self._by_base: dict[str, str] = _unique(
            (base_name(layer), layer) for layer in self._layers
        )
        names = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if (module._parameters or module._buffers) and name not in self.adapters
        ]
        known = self._layers.union(self._by_base)
        found = any(n and (n in known or base_name(n) in known) for n in names)
        bases = {base_name(name) for name in names}
        self.prefix = "" if found else _prefix(self._by_base, bases)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._known = {name: self._find(name) for name in modules}
        # two modules that would be one layer keep their names
        often = Counter(self._known[name] for name in names)
        self._known |= {n: n for n in names if often[self._known[n]] > 1}
        # the one with tensors is the layer, not one that only holds it
        self._modules: dict[str, str] = {
            self._known[n]: n for n in (*reversed(modules), *names[::-1])
        }

    def _find(self, name: str) -> str:
        if name in self.adapters or (not self.prefix and name in self._layers):
            return name
        wanted = join(self.prefix, base_name(name)).rstrip(".")
        if wanted in self._by_base:
            return self._by_base[wanted]
        # one without tensors, or one that is missing
        return join(self.prefix, name).rstrip(".") if self.prefix else name

    def layer(self, module: str) -> str:
        """The layer that a module is."""
        return self._known.get(module, module)

    def module(self, layer: str) -> str:
        """The module that a layer is."""
        return self._modules.get(layer, layer)

    def key(self, name: str) -> str:
        """The key of a parameter or a buffer in the checkpoint."""
        module, _, last = name.rpartition(".")
        return join(self.layer(module), last)

    def name(self, key: str) -> str:
        """The name of the parameter or the buffer that a key is of."""
        layer, _, last = key.rpartition(".")
        return join(self.module(layer), last)

    def is_adapter(self, name: str) -> bool:
        """Whether a parameter or a buffer is a part of an adapter."""
        return name.rpartition(".")[0] in self.adapters


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Pairs whose first is there once."""
    pairs = list(pairs)
    count = Counter(first for first, _ in pairs)
    return {first: second for first, second in pairs if count[first] == 1}


def _prefix(layers: Iterable[str], wanted: Collection[str]) -> str:
    """The words before most layers that are wanted; "" if that is not one prefix."""
    count: Counter[str] = Counter()
    for layer in layers:
        words = layer.split(".")
        for at in range(1, len(words) + 1):
            if ".".join(words[at:]) in wanted:
                count[".".join(words[:at])] += 1
    best = count.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return ""
    prefix: str = best[0][0]
    return prefix
