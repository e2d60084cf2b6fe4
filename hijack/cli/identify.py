"""``hijack identify``: detect the format of checkpoints.

The exit status is 0 if all can be loaded, 3 if one cannot (an unsupported format, an
ambiguous layer, a mismatch, an unconsumed scale), and 1 if a file is malformed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import hijack
from hijack.cli.common import add_assume, add_json, print_json
from hijack.errors import CheckpointError, HijackError, printable
from hijack.text import bytes_text, count_text, table

HELP = "detect the format of checkpoints"
#: Suffixes of the files that are looked at in a folder.
SUFFIXES = (".safetensors", ".sft", ".gguf")
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+?)(\.\d+)?-\d{5}-of-(?P<count>\d{5})\.safetensors")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "path",
        nargs="+",
        help="file, index, or folder, which is searched; shards of one name are one",
    )
    add_assume(parser)
    add_json(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="every layer")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 3 if a checkpoint cannot be loaded, 1 if one is broken."""
    sources = list(_sources(args.path))
    alone = len(args.path) == len(sources) == 1 and not Path(args.path[0]).is_dir()
    found: list[Facts] = []
    for source in sources:
        try:
            found.append(Facts.of(_identify(source, args.assume, alone)))
        except HijackError as error:
            if alone or len(sources) == 1:
                raise
            print(f"hijack: {error}", file=sys.stderr)
    if args.json:
        values = [facts.as_json() for facts in found]
        print_json(values[0] if alone else values)
    elif alone or args.verbose:
        print("\n\n".join(facts.as_text(args.verbose) for facts in found))
    elif found:
        head = ["file", "what it is", "model", "format", "parameters", "size", "note"]
        print(table(head, [facts.as_row() for facts in found]))
    if len(found) < len(sources):
        return 1
    return 0 if all(facts.result.clear for facts in found) else 3


def _identify(
    source: str | list[str], assume: Sequence[str], alone: bool
) -> hijack.Identification:
    """Identify; among many files, what is assumed counts where one is ambiguous."""
    if not alone:
        result = hijack.identify(source)
        if not result.ambiguous:
            return result
    return hijack.identify(source, assume=assume)


# -- files -----------------------------------------------------------------------------


def _sources(paths: Sequence[str]) -> Iterator[str | list[str]]:
    """The checkpoints that paths mean; shards that belong together are one."""
    files = [file for path in paths for file in _files(Path(path))]
    sets: dict[tuple[Path, str, str], list[str]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match is None:
            key = file.parent, file.name, ""
        else:
            key = file.parent, match["stem"], match["count"]
        sets.setdefault(key, []).append(str(file))
    for names in sets.values():
        yield names if len(names) > 1 else names[0]


def _files(path: Path) -> list[Path]:
    """A file itself, or the checkpoints in a folder: indexes without their shards."""
    if not path.is_dir():
        return [path]
    everything = sorted(file for file in path.rglob("*") if file.is_file())
    indexes = [file for file in everything if file.name.endswith(_INDEX)]
    indexed = {(file.parent, file.name.removesuffix(_INDEX)) for file in indexes}
    files = list(indexes)
    for file in everything:
        match = _SHARD.fullmatch(file.name)
        if match is not None and (file.parent, match["stem"]) in indexed:
            continue
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            files.append(file)
    if not files:
        raise CheckpointError(
            f"{path}: is a folder without checkpoints; expected files such as "
            f"model.safetensors in it; it has {len(everything)} other files"
        )
    return sorted(files)


# -- what was found --------------------------------------------------------------------


def _weight_counts(result: hijack.Identification) -> Iterator[int]:
    """Elements of the weight of each layer, of which several may be in a byte."""
    from hijack.checkpoint.conversion import dense_shape
    from hijack.registry import current_registry

    registry, infos = current_registry(), result.infos
    known: dict[object, int] = {}  # many layers are alike
    for claim in result.layers.values():
        tensors = [(role, infos[key]) for role, key in claim.keys.items()]
        kind = (claim.interpretation(), claim.shape, repr(tensors))
        if kind not in known:
            try:
                shape = dense_shape(infos, claim, registry.get(claim.scheme))
            except HijackError:  # it is raised again where the layer is read
                shape = infos[claim.keys["weight"]].shape
            known[kind] = math.prod(shape)
        yield known[kind]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What people want to know of a checkpoint at a glance.

    Attributes:
        result: what `hijack.identify` found.
        kind: such as ``LoRA``.
        model: name of the model's family, "" if it is unknown.
        parameters: number of weights of the model, of packed ones as stored.
        bytes: of all tensors.
    """

    result: hijack.Identification
    kind: str
    model: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, result: hijack.Identification) -> Facts:
        """Count, and look at the names."""
        from hijack.checkpoint.quantize import is_lora
        from hijack.model_families import detect_family

        infos = result.infos
        quantized = result.layers or result.unsupported or result.ambiguous
        kind = "quantized checkpoint" if quantized else "checkpoint"
        if is_lora(infos):
            kind = "LoRA"
        family = detect_family(infos)
        counts = {key: math.prod(info.shape) for key, info in infos.items()}
        for claim, count in zip(
            result.layers.values(), _weight_counts(result), strict=True
        ):
            counts |= dict.fromkeys(claim.keys.values(), 0)
            counts[claim.keys["weight"]] = count
        counts |= dict.fromkeys(result.unconsumed, 0)
        size = sum(info.nbytes for info in infos.values())
        if result.container:
            kind = result.container.partition(",")[0].removeprefix("a ")
            size = Path(result.source).stat().st_size
        model = "" if family is None else family.name
        return cls(result, kind, model, sum(counts.values()), size)

    def as_text(self, verbose: bool) -> str:
        """Everything, for a single checkpoint."""
        lines = [self.result.as_table(verbose=verbose)]
        if not self.result.container:
            count = count_text(self.parameters)
            facts = f"{self.kind}, {count} parameters, {bytes_text(self.bytes)}"
            lines.insert(0, printable(facts))
        if self.model:
            lines.append(f"model: {self.model}")
        return "\n".join(lines)

    def as_row(self) -> list[str]:
        """One row, among many checkpoints."""
        count = "-" if self.result.container else count_text(self.parameters)
        wrong = "" if self.result.clear else "cannot be loaded as it is; see -v"
        size = bytes_text(self.bytes)
        columns = [self.kind, self.model or "-", self._format(), count, size, wrong]
        return [self.result.source, *columns]

    def _format(self) -> str:
        from hijack.formats.report import block_word

        kinds = Counter(
            f"{claim.dialect} {block_word(self.result, claim)}"
            for claim in self.result.layers.values()
        )
        kinds.update(layer.format for layer in self.result.unsupported.values())
        if not kinds:
            kinds = Counter(info.dtype for info in self.result.infos.values())
        return ", ".join(kind for kind, _ in kinds.most_common(3)) or "-"

    def as_json(self) -> dict[str, object]:
        """Everything."""
        return {
            **json.loads(self.result.to_json()),
            "kind": self.kind,
            "model": self.model,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }
