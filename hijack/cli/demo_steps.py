"""The steps of ``hijack demo``: each does a part of the job and says what came out."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hijack
import hijack.cli.demo_host as demo_host
from hijack.cli.common import Stopwatch
from hijack.cli.minilm import Encoder, load_encoder, tokenize
from hijack.hosts import add_host
from hijack.hosts.adapter import Probe
from hijack.hosts.manager import remove_host
from hijack.patching import Patch
from hijack.safetensors_io.atomic import new_file
from hijack.safetensors_io.writer import write_checkpoint
from hijack.text import bytes_text, table

#: Name in tables and the picture, and options of ``quantize_file``.
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("per tensor", {"block_size": "tensor"}),
    ("per row", {"block_size": "row"}),
    ("128x128", {"block_size": (128, 128), "dialect": "hijack"}),
    ("1x64", {"block_size": (1, 64)}),
)
#: The encoder's matrices; the table of words and the pooler stay as they are.
LAYERS = "encoder.*"
SENTENCES = (
    "A plane is taking off from the runway.",
    "An air plane is taking off.",
    "How do I reset my password?",
    "I forgot the login for my account, what should I do?",
    "The central bank left interest rates unchanged on Thursday.",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "She sold the house and moved to the coast.",
    "The patient was given 5 mg of the drug twice a day.",
)
#: What the LoRA is to teach an encoder that knows English: to put these side by side.
PAIRS = (
    ("Der Zug nach Hamburg hat Verspätung.", "The train to Hamburg is delayed."),
    ("Das Wetter ist heute sehr schön.", "The weather is very nice today."),
    ("Wo ist der nächste Bahnhof?", "Where is the nearest station?"),
    ("Die Katze schläft auf dem Sofa.", "The cat is sleeping on the sofa."),
)
RANK, STEPS = 4, 40


class Int8Rows(hijack.Scheme):
    """A weight format in four lines: int8, one scale per row."""

    name = "demo_int8"
    targets = (nn.Linear,)

    def quantize(
        self, weight: Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Round to -127..127."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (weight / scale).round().to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata: Tensor, params: Any, dtype: torch.dtype) -> Tensor:
        """Multiply."""
        weight: Tensor = qdata.float() * params["weight_scale"]
        return weight.to(dtype)


class HostAdapter:
    """What hijack needs to know of the stand-in host."""

    NAME, MODULE, SUPPORTED = "demo_host", demo_host.__name__, ("1.0", "1.0")
    PROBES: tuple[Probe, ...] = (
        Probe(f"{demo_host.__name__}.load_weights", ("model", "path")),
    )

    def get_version(self) -> str:
        """Of the host."""
        return demo_host.VERSION

    def live(self) -> int:
        """The host keeps no model."""
        return 0

    def patches(self) -> list[Patch]:
        """One function: files with quantized layers are loaded by hijack."""
        return [Patch(demo_host, "load_weights", self._loading)]

    @staticmethod
    def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_weights(model: nn.Module, path: Path) -> None:
            if hijack.identify(path).layers:
                hijack.load(model, path, strict=False)
            else:
                original(model, path)

        return load_weights


class Demo:
    """The steps, and what they found.

    Args:
        model: folder of the trained encoder.
        folder: where files go.
        overwrite: whether files of an earlier run are replaced.
        quiet: print nothing.

    Attributes:
        facts: what each step found, for programs.
    """

    def __init__(
        self, model: Path, folder: Path, *, overwrite: bool, quiet: bool
    ) -> None:
        self.source, self.folder = model / "model.safetensors", folder
        self.overwrite, self.quiet = overwrite, quiet
        self.facts: dict[str, Any] = {}
        self._step = 0
        self.ids, self.mask = tokenize(model, SENTENCES)
        self.pairs = tokenize(model, [text for pair in PAIRS for text in pair])
        self.dense = load_encoder(self.source)
        self.vectors = self.dense(self.ids, self.mask)

    def run(self) -> None:
        """Do everything, in order."""
        self.say(
            "The model is all-MiniLM-L6-v2, a trained sentence encoder: "
            f"{bytes_text(self.source.stat().st_size)} of float32, half of it a table "
            "of words. The 36 matrices of its encoder are quantized to FP8."
        )
        self.quantize()
        self.identify()
        self.load()
        self.embed()
        self.merge_lora()
        self.patch_host()
        self.plug_in()
        self.conclude()
        self.draw()

    def say(self, text: str) -> None:
        """Print a table, or a paragraph of lines that terminals can hold."""
        if not self.quiet:
            print(text if "\n" in text else _filled(text))

    def title(self, text: str) -> None:
        """Print the title of the next step."""
        self._step += 1
        self.say(f"\n{self._step}. {text}\n")

    def path(self, name: str) -> Path:
        """A file of the demo."""
        return self.folder / f"minilm-{name.replace(' ', '-')}.safetensors"

    # -- steps -------------------------------------------------------------------------

    def quantize(self) -> None:
        """Write a file in each block size."""
        self.title("Quantize: one file in, one file out")
        watch = Stopwatch()
        for name, options in FORMATS:
            report = hijack.quantize_file(
                self.source,
                self.path(name),
                include=LAYERS,
                overwrite=self.overwrite,
                **options,
            )
        layers = report.layers
        weights = [self.dense.get_parameter(f"{layer}.weight") for layer in layers]
        before = sum(weight.nbytes for weight in weights)
        after = before - (report.bytes_before - report.bytes_after)
        self.facts["layers"] = {"count": len(layers), "before": before, "after": after}
        self.say(
            f"{len(FORMATS)} files written in {watch}, each with scales for other "
            f"blocks. In {self.path('1x64')}, blocks of 1x64, the {len(layers)} layers "
            f"take {bytes_text(after)} instead of {bytes_text(before)}."
        )

    def identify(self) -> None:
        """Say what the file is."""
        self.title("Identify: what is this file?")
        result = hijack.identify(self.path("1x64"))
        self.facts["identified"] = result.groups()
        self.say(result.as_table())

    def load(self) -> None:
        """Load it, save it, and compare every bit."""
        self.title("Load: into plain PyTorch, mapped from the file, bit for bit")
        encoder = load_encoder(self.path("1x64"))
        again = self.path("saved again")
        hijack.save(encoder, again, overwrite=self.overwrite)
        written, read = load_file(self.path("1x64")), load_file(again)
        # the file has a pooler and a table of positions that the model does not use
        equal = [key for key, t in read.items() if _same(t, written[key])]
        self.facts["round_trip"] = {"tensors": len(read), "equal": len(equal)}
        self.say(
            f"Saved again, {len(equal)} of {len(read)} tensors are equal to those "
            "loaded, bit for bit."
        )

    def embed(self) -> None:
        """Compare what the models compute."""
        self.title("Use: are the sentence embeddings still the same?")
        rows, angles = [], {}
        for name, _ in FORMATS:
            vectors = load_encoder(self.path(name))(self.ids, self.mask)
            angles[name] = [_degrees(c) for c in (vectors * self.vectors).sum(-1)]
            errors = hijack.compare_files(self.source, self.path(name)).layers
            sqnr = [e.sqnr for e in errors.values() if math.isfinite(e.sqnr)]
            self.facts.setdefault("sqnr_db", {})[name] = sqnr
            rows.append(
                [
                    name,
                    bytes_text(self.path(name).stat().st_size),
                    f"{_mean(sqnr):.1f}",
                    f"{_mean(angles[name]):.2f}",
                    f"{max(angles[name]):.2f}",
                ]
            )
        self.facts["degrees"] = angles
        head = ["blocks", "file", "weights, dB", "mean angle", "largest angle"]
        self.say(table(head, rows))
        own = _nearest(self.vectors)
        kept = _nearest(load_encoder(self.path("1x64"))(self.ids, self.mask))
        same = int((own == kept).sum())
        self.facts["same_neighbour"] = same
        apart = _degrees(self.vectors[0] @ self.vectors[1])
        self.say(
            f"Angles are in degrees, to the embeddings of the float32 file. For scale, "
            f"'{SENTENCES[0]}' and '{SENTENCES[1]}' are {apart:.0f} degrees apart. "
            f"With 1x64 blocks {same} of {len(SENTENCES)} sentences keep their nearest "
            "neighbour."
        )

    def merge_lora(self) -> None:
        """Train a LoRA, merge it while quantizing, and see that it works as before."""
        self.title("Merge a LoRA: trained on the dense model, merged into the FP8 file")
        watch = Stopwatch()
        lora = self.folder / "german-lora.safetensors"
        tensors = train_lora(self.dense, *self.pairs)
        write_checkpoint(lora, tensors, overwrite=self.overwrite)
        trained = watch.seconds
        merged = self.path("with lora")
        hijack.quantize_file(
            self.source,
            merged,
            loras=[lora],
            include=LAYERS,
            overwrite=self.overwrite,
        )
        dense = load_encoder(self.source)
        for key, down in tensors.items():
            if key.endswith("lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                up = tensors[f"{layer}.lora_B.weight"]
                weight = dense.get_parameter(f"{layer}.weight")
                weight.data = weight + up @ down
        angles = {
            "float32": self._pairs(self.dense),
            "float32 with LoRA": self._pairs(dense),
            "FP8": self._pairs(load_encoder(self.path("1x64"))),
            "FP8 with LoRA": self._pairs(load_encoder(merged)),
        }
        self.facts["lora_degrees"] = angles
        rows = [[name, f"{angle:.1f}"] for name, angle in angles.items()]
        self.say(table(["model", "mean angle"], rows))
        self.say(
            f"The LoRA (rank {RANK}, {STEPS} steps, {trained:.0f} s) teaches an "
            f"English encoder to put {len(PAIRS)} German sentences beside their "
            "translations. The FP8 file has learned the same."
        )

    def _pairs(self, encoder: Encoder) -> float:
        """Mean angle between sentences and their translations."""
        vectors = encoder(*self.pairs)
        cosines = (vectors[::2] * vectors[1::2]).sum(-1)
        return _mean(list(map(_degrees, cosines)))

    def patch_host(self) -> None:
        """Let a program that knows nothing of FP8 read the file."""
        self.title("Patch a host: a program that never heard of this format")
        add_host(HostAdapter())
        try:
            self._patch_host()
        finally:
            hijack.unpatch(HostAdapter.NAME)
            remove_host(HostAdapter.NAME)

    def _by_host(self) -> float:
        """Mean angle of what the host computes from the FP8 file."""
        vectors = demo_host.embed(self.path("1x64"), self.ids, self.mask)
        angles = [_degrees(cosine) for cosine in (vectors * self.vectors).sum(-1)]
        return _mean(angles)

    def _patch_host(self) -> None:
        before = dict(vars(demo_host))
        angles = {"without hijack": self._by_host()}
        hijack.patch(HostAdapter.NAME)
        angles["patched"] = self._by_host()
        hijack.unpatch(HostAdapter.NAME)
        angles["unpatched"] = self._by_host()
        self.facts["host_degrees"] = angles
        self.facts["host_restored"] = restored = before == dict(vars(demo_host))
        rows = [[name, f"{angle:.2f}"] for name, angle in angles.items()]
        self.say(table(["the host", "mean angle"], rows))
        comfyui = "ComfyUI is patched in the same way, by `hijack.patch('comfyui')`"
        if "comfy.sd" not in sys.modules:
            comfyui += "; none is loaded here, so a stand-in of 30 lines is the host"
        state = "what it was, object for object" if restored else "NOT what it was"
        self.say(
            "Alone the host takes FP8 codes for weights, and its embeddings point "
            f"anywhere. Afterwards its module is {state}. {comfyui}."
        )

    def plug_in(self) -> None:
        """Add a weight format and use it."""
        self.title("Plug a scheme in: a format that hijack does not have")
        hijack.register(Int8Rows())
        try:
            hijack.quantize_file(
                self.source,
                self.path("int8"),
                Int8Rows.name,
                include=LAYERS,
                overwrite=self.overwrite,
            )
            vectors = load_encoder(self.path("int8"))(self.ids, self.mask)
        finally:
            hijack.unregister(Int8Rows.name)
        angles = [_degrees(cosine) for cosine in (vectors * self.vectors).sum(-1)]
        self.facts["plugged_in_degrees"] = angles
        self.say(
            "Int8, one scale a row, is a class with `quantize` and `dequantize`, four "
            "lines in all. Files, loading and computing work at once; the mean angle "
            f"is {_mean(angles):.2f} degrees."
        )

    def conclude(self) -> None:
        """Say what all of it means."""
        facts = self.facts
        layers, angles = facts["layers"], facts["degrees"]
        lora = facts["lora_degrees"]
        self.say("\nWhat this shows\n")
        for sentence in (
            f"Quantized layers take {layers['after'] / layers['before']:.0%} of their "
            "bytes, and are read, saved and recognised without losing a bit.",
            f"FP8 turns embeddings by {_mean(angles['1x64']):.1f} degrees. Smaller "
            f"blocks help, a little on this model: {_mean(angles['per tensor']):.1f} "
            "with one scale for a whole weight.",
            "A LoRA merged into the FP8 file does what it does in float32: "
            f"{lora['FP8 with LoRA']:.1f} degrees against "
            f"{lora['float32 with LoRA']:.1f}.",
            "A host reads the format while it is patched, and is itself again "
            "afterwards.",
            "The best format depends on the model: int8 rows, plugged in above, err by "
            f"{_mean(facts['plugged_in_degrees']):.1f} degrees here.",
        ):
            self.say(_filled(f"- {sentence}", indent="  "))

    def draw(self) -> None:
        """Draw the angles, if matplotlib is installed."""
        target = self.folder / "angles.png"
        try:
            from hijack.cli.plot import draw_demo
        except ImportError as error:
            self.say(f"\nNo picture: {error.name} is not installed.")
            return
        facts = self.facts
        formats = {**facts["degrees"], "int8 plugged in": facts["plugged_in_degrees"]}
        with new_file(target, overwrite=self.overwrite) as part:
            draw_demo(formats, facts["lora_degrees"], facts["host_degrees"], part)
        facts["picture"] = str(target)
        self.say(f"\nThe angles are drawn in {target}.")


def train_lora(encoder: Encoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Train a LoRA on queries and values, beside weights that stay as they are.

    Args:
        encoder: the dense model; unchanged afterwards.
        ids: token ids (B, T), of a sentence and its translation by turns; the target
            of both is the embedding that the translation has now.
        mask: of the tokens, (B, T).

    Returns:
        Key to tensor, as PEFT names them.
    """
    generator = torch.Generator().manual_seed(0)
    target = encoder(ids, mask)[1::2].repeat_interleave(2, 0)
    tensors: dict[str, Tensor] = {}
    hooks = []
    for name, module in encoder.named_modules():
        if not name.endswith(("self.query", "self.value")):
            continue
        width = module.in_features
        down = torch.randn(RANK, width, generator=generator) / math.sqrt(width)
        up = torch.zeros(module.out_features, RANK)
        tensors[f"{name}.lora_A.weight"] = down.requires_grad_()
        tensors[f"{name}.lora_B.weight"] = up.requires_grad_()
        hooks.append(
            module.register_forward_hook(
                lambda _, args, out, a=down, b=up: out + args[0] @ a.T @ b.T
            )
        )
    optimizer = torch.optim.Adam(tensors.values(), lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for each other in so small a job
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 1 - (encoder(ids, mask) * target).sum(-1)
        loss.mean().backward()
        optimizer.step()
    torch.set_num_threads(threads)
    for hook in hooks:
        hook.remove()
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _filled(text: str, indent: str = "") -> str:
    """Lines that terminals can hold; a path with a hyphen in it stays whole."""
    return textwrap.fill(text, 88, subsequent_indent=indent, break_on_hyphens=False)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.view(torch.uint8), second.view(torch.uint8)
    )


def _degrees(cosine: Tensor) -> float:
    return math.degrees(math.acos(min(1.0, float(cosine))))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _nearest(vectors: Tensor) -> Tensor:
    """The index of the nearest other sentence of each."""
    similar = vectors @ vectors.T
    return similar.fill_diagonal_(-1).argmax(1)
