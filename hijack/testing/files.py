"""The part of the conformance kit that writes and reads checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import hijack
from hijack.claim import Certainty, Claim
from hijack.errors import HijackError
from hijack.formats import matching
from hijack.formats.dialect import Dialect
from hijack.formats.native_marker import METADATA_KEY, write_marker
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.scheme import Scheme
from hijack.testing.base import Shape
from hijack.testing.checks import (
    alone,
    describe,
    equal,
    expect,
    kind_of,
    outcome,
    quantized_of,
    same_bits,
    second_instance,
    weight_of,
)
from hijack.testing.modules import ModuleConformance

#: Another method, named as ``config.json`` names it.
_OTHER_METHOD = {"quantization_config": json.dumps({"quant_method": "another_method"})}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model that was saved in one dialect.

    Attributes:
        dialect: its name.
        path: the file.
        model: the wrapped modules.
        inputs: an input for each.
    """

    dialect: str
    path: Path
    model: nn.ModuleList
    inputs: list[Tensor]

    def fresh(self) -> nn.ModuleList:
        """Dense modules of the same kind and of other weights."""
        model = hijack.unwrap(copy.deepcopy(self.model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        return model

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        tensors = open_tensors(read_header(self.path))
        return {key: tensors[key].clone() for key in tensors}

    def metadata(self) -> dict[str, str]:
        """The strings of its header."""
        return dict(read_header(self.path).metadata)


class FileConformance(ModuleConformance):
    """Tests of the scheme's dialects, of whole files, and of claims to layers."""

    def test_file_round_trip(self, scheme: Scheme, tmp_path: Path) -> None:
        """A saved model is recognised by its header, and computes the same."""
        for stored in self._stored(scheme, tmp_path):
            where = f"{scheme.name}: dialect {stored.dialect}"
            native = stored.dialect == matching.native_of(scheme).name
            with alone(scheme):
                found = {
                    layer: claim.scheme
                    for layer, claim in hijack.identify(stored.path).claims().items()
                }
                expected = {str(i): scheme.name for i in range(len(stored.model))}
                expect(
                    found == expected,
                    f"{where}: identify: got {found}, expected {expected}",
                )
                fresh = stored.fresh()
                hijack.load(fresh, stored.path)
            for part, again, x in zip(stored.model, fresh, stored.inputs, strict=True):
                what = f"{where}: {kind_of(part)}: load"
                same = torch.equal(_dense(part), _dense(again))
                if native:
                    same = same and equal(quantized_of(part), quantized_of(again))
                expect(same, f"{what}: got other codes than were saved")
                self._expect_same(again(x), part(x), what)

    def test_dialects_spell_what_they_read(
        self, scheme: Scheme, tmp_path: Path
    ) -> None:
        """What a dialect decodes it encodes to the same tensors, on meta too."""
        for stored in self._stored(scheme, tmp_path):
            dialect = matching.dialect_of(scheme, stored.dialect)
            tensors, header = stored.tensors(), read_header(stored.path)
            with alone(scheme):
                claims = hijack.identify(header).claims()
            for layer, claim in claims.items():
                where = f"{scheme.name}: dialect {dialect.name}: layer {layer}"
                made = matching.decode(scheme, claim, tensors)
                options = {**self.options, **matching.options_of(claim, scheme, made)}
                written = dialect.encode(*made, options)
                got = {join(layer, name): t for name, t in written.items()}
                wrong = [
                    key
                    for key in claim.keys.values()
                    if key not in got or not _equal_tensors(got[key], tensors[key])
                ]
                expect(not wrong, f"{where}: encode: got other {wrong} than decode had")
                metas = {key: t.to("meta") for key, t in tensors.items()}
                on_meta = matching.decode(scheme, claim, metas)
                expect(
                    describe(on_meta) == describe(made),
                    f"{where}: decode on meta: got {describe(on_meta)}, expected "
                    f"{describe(made)}",
                )
                planned = dialect.encode(*on_meta, options)
                expect(
                    {n: (t.dtype, t.shape) for n, t in planned.items()}
                    == {n: (t.dtype, t.shape) for n, t in written.items()},
                    f"{where}: encode on meta: got other tensors than with data",
                )

    def test_convert_file(self, scheme: Scheme, tmp_path: Path) -> None:
        """Files of every dialect become files of every other that can spell them."""
        files = list(self._stored(scheme, tmp_path))
        for stored in files:
            for other in files:
                where = f"{scheme.name}: convert {stored.dialect} to {other.dialect}"
                path = tmp_path / f"{stored.dialect}-{other.dialect}.safetensors"
                with alone(scheme):
                    try:
                        hijack.convert_file(stored.path, path, other.dialect)
                    except HijackError as error:
                        native = other.dialect == matching.native_of(scheme).name
                        same = other.dialect == stored.dialect
                        expect(not native and not same, f"{where}: {error}")
                        continue
                    fresh = stored.fresh()
                    hijack.load(fresh, path)
                for part, again in zip(stored.model, fresh, strict=True):
                    expect(
                        torch.equal(_dense(part), _dense(again)),
                        f"{where}: {kind_of(part)}: got another weight",
                    )

    def test_files_hold_everything(self, scheme: Scheme, tmp_path: Path) -> None:
        """A second instance reads a file of any options, and can quantize alike."""
        other = second_instance(scheme)
        if other is None:
            return
        for number, options in enumerate(self._option_sets(scheme)):
            path = tmp_path / f"{number}.safetensors"
            where = f"{scheme.name}: options { {**self.options, **options} }"
            model, inputs = self._wrapped_model(scheme, options)
            with alone(scheme):
                hijack.save(model, path, matching.native_of(scheme).name)
            stored = Stored("", path, model, inputs)
            with alone(other):
                fresh = stored.fresh()
                hijack.load(fresh, path)
                for part, again, x in zip(model, fresh, inputs, strict=True):
                    self._expect_same(
                        again(x), part(x), f"{where}: {kind_of(part)}: load elsewhere"
                    )
                    weight: Any = weight_of(again)
                    with torch.no_grad():
                        anew = other.requantize(weight.dense(), weight)
                    expect(
                        describe(anew) == describe(quantized_of(part)),
                        f"{where}: {kind_of(part)}: requantize after loading: got "
                        f"{describe(anew)}, expected {describe(quantized_of(part))}",
                    )

    def test_quantized_file(self, scheme: Scheme, tmp_path: Path) -> None:
        """Quantizing a file gives what quantizing the model gives."""
        src, dst = tmp_path / "dense.safetensors", tmp_path / "quantized.safetensors"
        model, fresh = self._model(scheme), self._model(scheme)
        safetensors.torch.save_file(model.state_dict(), src)
        with alone(scheme):
            report = hijack.wrap_model(model, scheme, **self.options)
            # the native dialect spells every option; others may round them
            options: dict[str, Any] = {"dialect": "hijack", **self.options}
            hijack.quantize_file(src, dst, scheme, include=report.layers, **options)
            hijack.load(fresh, dst)
        for part, again in zip(model, fresh, strict=True):
            expect(
                equal(quantized_of(part), quantized_of(again)),
                f"{scheme.name}: {kind_of(part)}: quantize_file: got other codes than "
                "wrap_model",
            )

    # -- claims ------------------------------------------------------------------------

    def test_layers_of_others_are_not_claimed(self, scheme: Scheme) -> None:
        """Dense layers, and those that a marker or config gives to others, are left."""
        for what, tensors, metadata in self._foreign_files(scheme):
            header = Header.from_state_dict(tensors, metadata)
            claimed = [
                f"{claim.layer} ({claim.dialect}, {claim.certainty.name})"
                for claim in matching.claims_of(scheme, header)
                if claim.certainty is not Certainty.GUESS
            ]
            expect(
                not claimed,
                f"{scheme.name}: match: got claims to {claimed}, which are {what}, "
                "expected none",
            )

    def test_unfitting_layers_are_not_claimed(
        self, scheme: Scheme, tmp_path: Path
    ) -> None:
        """A layer with a tensor missing, or of a wrong shape or dtype, is refused."""
        for stored in self._stored(scheme, tmp_path):
            tensors, metadata = stored.tensors(), stored.metadata()
            with alone(scheme):
                claims = hijack.identify(stored.path).claims()
            claim = claims.get("0")
            if claim is None:
                continue
            for what, changed in _unfitting(tensors, claim):
                where = f"{scheme.name}: dialect {stored.dialect}: a layer with {what}"
                header = Header.from_state_dict(changed, metadata)
                found = [
                    c
                    for c in matching.claims_of(scheme, header)
                    if c.layer == "0" and c.certainty is not Certainty.GUESS
                ]
                unmarked = METADATA_KEY not in metadata
                expect(
                    not (found and unmarked and "dtype" in what),
                    f"{where}: got a claim ({found and found[0].evidence}), expected "
                    "none",
                )
                if not found or ("dtype" in what):
                    continue
                path = tmp_path / "changed.safetensors"
                safetensors.torch.save_file(changed, path, metadata)
                with alone(scheme):
                    got = outcome(_loaded_output, stored, path)
                x = stored.inputs[0]
                harmless = isinstance(got, Exception) or torch.equal(
                    got, stored.model[0](x)
                )
                expect(
                    harmless,
                    f"{where}: got a layer with other outputs, expected an error",
                )

    def test_likeness_tells_layers_apart(self, scheme: Scheme, tmp_path: Path) -> None:
        """Layers that are claimed differently have different likenesses."""
        plain = copy.copy(scheme)
        plain.likeness = lambda header, layer: None  # type: ignore[method-assign]
        for stored in self._stored(scheme, tmp_path):
            header, tensors = read_header(stored.path), stored.tensors()
            claim = next(iter(_claims(scheme, header)), None)
            files = [(tensors, stored.metadata())]
            for _, others, metadata in self._foreign_files(scheme):
                files.append((others, metadata))
            if claim is not None and claim.layer:
                for _, changed in _unfitting(tensors, claim):
                    files.append((changed, stored.metadata()))
            mixed, marks = _mixed(files)
            for backwards in (False, True):
                keys = sorted(mixed, reverse=backwards)
                header = Header.from_state_dict({k: mixed[k] for k in keys}, marks)
                got, expected = _claims(scheme, header), _claims(plain, header)
                differ = sorted(
                    {c.layer for c in got if c not in expected}
                    | {c.layer for c in expected if c not in got}
                )
                expect(
                    not differ,
                    f"{scheme.name}: likeness: got other claims to {differ} than "
                    "without it",
                )

    # -- details -----------------------------------------------------------------------

    def _wrapped_model(
        self, scheme: Scheme, options: Mapping[str, Any]
    ) -> tuple[nn.ModuleList, list[Tensor]]:
        model, inputs = nn.ModuleList(), []
        for module, x in self._all_subjects(scheme):
            shape = tuple(weight_of(module).shape)
            if scheme.declines(shape, **{**self.options, **options}) is None:
                model.append(self._wrap(scheme, module, **options))
                inputs.append(x)
        return model, inputs

    def _stored(self, scheme: Scheme, folder: Path) -> Iterator[Stored]:
        """A saved model in each dialect that is written."""
        dialects = {d.name: d for d in matching.dialects_of(scheme) if d.writes}
        if self.dialect is not None:
            dialects = {self.dialect: dialects[self.dialect]}
        for name, dialect in dialects.items():
            model, inputs = nn.ModuleList(), []
            for module, x in self._file_subjects(scheme):
                wrapped = self._wrap_for(scheme, module, dialect)
                if wrapped is not None:
                    model.append(wrapped)
                    inputs.append(x)
            expect(
                len(model) > 0,
                f"{scheme.name}: dialect {name}: encode: refuses every layer, expected "
                "one that can be written",
            )
            path = folder / f"{name}.safetensors"
            with alone(scheme):
                hijack.save(model, path, name)
            yield Stored(name, path, model, inputs)

    def _file_subjects(self, scheme: Scheme) -> list[tuple[nn.Module, Tensor]]:
        """The subjects, and a Linear that every usual block divides."""
        found = self.subjects(scheme)
        if nn.Linear in scheme.targets and self._takes(scheme, (128, 256)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                module = nn.Linear(256, 128, device=self.device)
                found.append((module, torch.randn(3, 256).to(self.device)))
        return found

    def _wrap_for(
        self, scheme: Scheme, module: nn.Module, dialect: Dialect
    ) -> nn.Module | None:
        """A module in options a dialect can spell, or None."""
        shape: Shape = tuple(weight_of(module).shape)
        for asked in (self.options, {}):
            try:
                options = dialect.fit_options(shape, asked)
                with alone(scheme) as registry:
                    wrapped = hijack.wrap_module(
                        copy.deepcopy(module), scheme, registry=registry, **options
                    )
                dialect.encode(*quantized_of(wrapped), options)
            except HijackError:
                continue
            return wrapped
        return None

    def _foreign_files(
        self, scheme: Scheme
    ) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
        """What others write: a description, tensors, metadata."""
        n, k = self.weight_shape[0], self.weight_shape[-1]
        dense = {
            f"dense.{dtype}.weight": torch.zeros((n, k), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        yield "dense", {**dense, "dense.norm.weight": torch.zeros(k)}, {}
        scaled = {
            "dense.weight": torch.zeros(n, k),
            "dense.weight_scale": torch.zeros(n, 1),
            "dense.scale": torch.zeros(1),
        }
        yield "dense, with a scale of something else", scaled, {}
        made = self._quantize(scheme, self._weight())
        own = {"mine.weight": made[0], **{f"mine.{n}": t for n, t in made[1].items()}}
        marker = {"mine": {"scheme": "another_scheme", "params": list(made[1])}}
        yield "marked for another scheme", own, {METADATA_KEY: write_marker(marker)}
        if not scheme.claims_unmarked:
            yield "not marked", own, {}
            yield "of another method by the config", own, _OTHER_METHOD
        fp8 = made[0].dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        # names and dtypes that many programs write, each with a meaning of its own
        for dtype in (
            torch.int8,
            torch.uint8,
            *(() if fp8 else (torch.float8_e4m3fn,)),
        ):
            for name, shape in (("weight_scale", (n, 1)), ("scale", (1,))):
                others = {
                    "other.weight": torch.zeros((n, k)).to(dtype),
                    f"other.{name}": torch.ones(shape),
                }
                fits = describe((others["other.weight"], {name: torch.ones(shape)}))
                if not (scheme.claims_unmarked and fits == describe(made)):
                    yield f"{dtype} with a {name} of others, unmarked", others, {}


def _claims(scheme: Scheme, header: Header) -> list[Claim]:
    return list(matching.claims_of(scheme, header))


def _dense(module: nn.Module) -> Tensor:
    weight: Any = weight_of(module)
    with torch.no_grad():
        dense: Tensor = weight.dense(torch.float32)
    return dense


def _equal_tensors(first: Tensor, second: Tensor) -> bool:
    # a scale of one element has the rank that a file gives it
    return same_bits(first.reshape(-1), second.reshape(-1))


def _loaded_output(stored: Stored, path: Path) -> Tensor:
    fresh = stored.fresh()
    hijack.load(fresh, path)
    output: Tensor = fresh[0](stored.inputs[0])
    return output


def _unfitting(
    tensors: Mapping[str, Tensor], claim: Claim
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A file with one defect in one layer: a description, and its tensors."""
    for role, key in claim.keys.items():
        tensor = tensors[key]
        # those that do not affect the weight may be anything
        if role == "weight" or role in claim.unused or not tensor.numel():
            continue
        yield f"no {role}", {k: t for k, t in tensors.items() if k != key}
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        longer = torch.cat([_as_bytes(rows), _as_bytes(rows[-1:])]).view(rows.dtype)
        longer = longer.view(rows.shape[0] + 1, *rows.shape[1:])
        yield f"a row too many in {role}", {**tensors, key: longer}
        other = torch.zeros(tensor.shape, dtype=torch.bool)
        yield f"another dtype of {role}", {**tensors, key: other}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _mixed(
    files: list[tuple[dict[str, Tensor], dict[str, str]]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All files in one, under names of their own, with hijack's marker of each."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    rest: dict[str, str] = {}
    for index, (more, metadata) in enumerate(files):
        tensors |= {f"file{index}.{key}": tensor for key, tensor in more.items()}
        table = json.loads(metadata.get(METADATA_KEY, "{}")).get("layers", {})
        layers |= {f"file{index}.{layer}": entry for layer, entry in table.items()}
    if layers:
        rest[METADATA_KEY] = write_marker(layers)
    return tensors, rest
