"""Words in the names of layers that stand for wrappers, not for parts of a network.

``torch.compile``, FSDP and checkpointing put a word anywhere in a name; trainers and
hosts put words in front of it. Without them, a layer has one name in all files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

#: Modules that only wrap another one, anywhere in a name.
_TRANSPARENT = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "original_module",
        "base_layer",
        "module",
    }
)
#: The same, in names whose dots are underscores.
_FLAT_TRANSPARENT = re.compile(
    r"_{1,2}(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)_"
)
#: Modules that hold a whole network, at the start of a name. Words such as "student"
#: and "ema" are none of them: they tell one of two networks from the other.
_WRAPPERS = frozenset(
    {
        "backbone",
        "base_model",
        "bert",
        "decoder",
        "denoiser",
        "diffusion",
        "diffusion_model",
        "dit",
        "language_model",
        "model",
        "net",
        "network",
        "pipe",
        "pipeline",
        "state_dict",
        "transformer",
        "unet",
        "velocity_model",
    }
)
#: What trainers put before names whose dots are underscores; some put their own before.
_FLAT_START = re.compile(r"(?:[A-Za-z0-9]+_)*?(?:lora|lycoris)_+(?:prior_)?")
#: Wrappers in such names; ``transformer_blocks`` is no wrapper.
_FLAT_WRAPPER = re.compile(
    r"(?:unet|transformer(?!_+blocks?_)|diffusion_model|diffusion|base_model"
    r"|language_model|model|net|dit|pipe|decoder|module)_+"
)


#: More than any file has; a damaged one may have thousands.
_MOST_WRAPPERS = 10


def plain(name: str) -> str:
    """A name without the modules that `torch.compile` and the like put in it."""
    words = [word for word in name.split(".") if word not in _TRANSPARENT]
    return ".".join(words) if words else name


def shorter_names(name: str) -> Iterator[str]:
    """A name, and what is left of it as wrappers are taken from its start.

    Args:
        name: of a layer or a parameter in a checkpoint or a LoRA file; its dots may be
            underscores.
    """
    shorter: str | None = name
    for _ in range(_MOST_WRAPPERS):
        if shorter is None:
            return
        yield shorter
        shorter = _without_wrapper(shorter)


def _without_wrapper(name: str) -> str | None:
    """What is left of a name without its first wrapper; None if it has none."""
    # SimpleTuner has written names that end in an underscore
    unwrapped = _FLAT_TRANSPARENT.sub("_", plain(name)).rstrip("_")
    if unwrapped and unwrapped != name:
        return unwrapped
    first, _, rest = name.partition(".")
    if rest and first in _WRAPPERS:
        return rest
    match = _FLAT_START.match(first) or (not rest and _FLAT_WRAPPER.match(first))
    return name[match.end() :] if match and match.end() < len(first) else None


def common_wrapper(names: Iterable[str]) -> str:
    """What precedes the blocks of a network in all names, with a dot; or nothing.

    Wrappers that nobody has heard of are told by this: they are in front of all layers.

    Args:
        names: of a file, with dots. Those without the number of a block do not count.
    """
    paths = [name.split(".") for name in names]
    paths = [path for path in paths if any(map(str.isdecimal, path))]
    if not paths:
        return ""
    block = next(i for i, word in enumerate(paths[0]) if word.isdecimal()) - 1
    shared = ""
    for words in itertools.islice(zip(*paths, strict=False), max(block, 0)):
        if len(set(words)) > 1:
            break
        shared += f"{words[0]}."
    return shared
