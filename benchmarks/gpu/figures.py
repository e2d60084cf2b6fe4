"""What a GPU's time and memory are spent on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hijack
import schemes
from benchmarks.forward import make_pool, measure_pool
from benchmarks.gpu.checks import inferring, usable
from benchmarks.gpu.subjects import LAYERS, Model, make_layer
from benchmarks.harness import Benchmark, Chart, Missing, Row, Setting, first_line
from benchmarks.kernels import KINDS, kernels, plain_decode, random_weight
from benchmarks.lora import make_layer as make_fp8_layer
from benchmarks.lora import measure_layer
from benchmarks.peers import musubi, no_musubi
from benchmarks.timing import alternate, milliseconds, ratio

ROWS, QUICK_ROWS = (1, 16, 64, 256, 1024, 4096), (1, 16)
SHAPES, QUICK_SHAPES = ((3072, 12288), (3072, 3072), (12288, 3072)), ((256, 512),)
BLOCKS = ((1, 64), (128, 128))
ROUNDS = 9


def rows_of(setting: Setting) -> tuple[int, ...]:
    """Numbers of rows of the input."""
    return QUICK_ROWS if setting.quick else ROWS


def shapes_of(setting: Setting) -> tuple[tuple[int, int], ...]:
    """(K, N) of the layers."""
    return QUICK_SHAPES if setting.quick else SHAPES


# -- layers ----------------------------------------------------------------------------


def forward(setting: Setting) -> Iterator[Row | Missing]:
    """hijack's layers over bfloat16 and beside musubi-tuner's forward."""
    told: set[Missing] = set()
    for size in BLOCKS:
        for k, n in shapes_of(setting):
            room = 1 << 20 if setting.quick else 200 << 20
            pool = make_pool(n, k, size, room, setting.device)
            pool.runs = {
                name: each
                for name, each in pool.runs.items()
                if not name.startswith("kernel")
            }
            head = {"block": f"{size[0]}x{size[1]}"}
            yield from measure_pool(pool, head, rows_of(setting), setting)
            told |= {each for each in pool.missing if "kernel" not in each.what}
    yield from sorted(told, key=lambda each: each.what)


def formats(setting: Setting) -> Iterator[Row | Missing]:
    """A layer of every format over bfloat16, with quantized inputs too."""
    for k, n in shapes_of(setting)[:1]:
        count = 2 if setting.quick else 5
        words: Any = {"dtype": torch.bfloat16, "device": setting.device}
        dense = [torch.randn(n, k, **words) for _ in range(count)]
        runs: dict[str, list[Any]] = {
            "bf16": [lambda x, w=w: F.linear(x, w) for w in dense]
        }
        for title in LAYERS:
            try:
                layers = [
                    make_layer(title, n, k, setting.device, bias=False) for _ in dense
                ]
            except Exception as failure:
                yield Missing(title, first_line(failure))
            else:
                runs[title] = list(layers)
        for m in rows_of(setting):
            yield from _over_bf16(runs, {"layer": f"{k} -> {n}", "M": m}, k, setting)


def forward_of_kernels(setting: Setting) -> Iterator[Row | Missing]:
    """Each kernel by itself, for each kind of weight, over bfloat16."""
    refused: dict[tuple[str, str], list[str]] = {}
    k, n = shapes_of(setting)[0]
    for kind in KINDS:
        count = 2 if setting.quick else 5
        weights = [random_weight(kind, n, k, setting.device, i) for i in range(count)]
        dense = [plain_decode(weight, torch.bfloat16) for weight in weights]
        runs: dict[str, list[Any]] = {
            "bf16": [lambda x, w=w: F.linear(x, w) for w in dense]
        }
        for name, kernel in kernels(setting.device).items():
            why = kernel.refuses(weights[0], torch.bfloat16)
            if why is not None:
                refused.setdefault((name, why), []).append(kind)
                continue
            runs[name] = [
                lambda x, f=kernel.linear, w=w: f(x, w, None) for w in weights
            ]
        if len(runs) == 1:
            yield Missing(kind, "no kernel takes it")
            continue
        for m in rows_of(setting):
            yield from _over_bf16(runs, {"weight": kind, "M": m}, k, setting)
    for (name, why), kinds in refused.items():
        yield Missing(f"{name}: {'; '.join(kinds)}", why)


def _over_bf16(
    runs: dict[str, list[Any]], head: dict[str, Any], k: int, setting: Setting
) -> Iterator[Row | Missing]:
    """A row of the times of all that run; each has a function for every weight."""
    x = torch.randn(head["M"], k, dtype=torch.bfloat16, device=setting.device)
    calls = {}
    for name, each in runs.items():
        try:
            each[0](x)
        except Exception as failure:
            where = ", ".join(f"{key} {value}" for key, value in head.items())
            yield Missing(f"{name}, {where}", first_line(failure))
            continue
        calls[name] = lambda turn, each=each: each[turn % len(each)](x)
    seconds = alternate(calls, setting.rounds_or(ROUNDS), 20 if x.is_cuda else 2)
    bf16 = seconds.pop("bf16")
    row: dict[str, Any] = {**head, "bf16, ms": milliseconds(bf16)}
    yield row | {name: ratio(each, bf16) for name, each in seconds.items()}


def lora(setting: Setting) -> Iterator[Row | Missing]:
    """One and three LoRAs of rank 32 beside an FP8 weight."""
    for k, n in shapes_of(setting):
        layer = make_fp8_layer(n, k, setting.device)
        for m in rows_of(setting):
            rounds = setting.rounds_or(ROUNDS)
            cells = measure_layer(layer, n, k, m, setting.device, rounds, 20)
            yield {"layer": f"{k} -> {n}", "M": m, **cells}


# -- launches and memory ---------------------------------------------------------------


def launches(call: Callable[[], object], device: str) -> list[str]:
    """The kernels that a call starts; on a CPU, its operators."""
    call()
    on_cpu = device == "cpu"
    activities = [ProfilerActivity.CPU]
    if not on_cpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        call()
        if not on_cpu:
            torch.cuda.synchronize()
    kind = DeviceType.CPU if on_cpu else DeviceType.CUDA
    return [event.name for event in profiled.events() if event.device_type == kind]


def temporary_bytes(call: Callable[[], Tensor], device: str) -> float | None:
    """The most that a call allocates beside its result; None on a CPU."""
    if device == "cpu":
        return None
    result = call().nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before - result


def counted(setting: Setting) -> Iterator[Row | Missing]:
    """Launches and temporaries of a forward, beside those of a dense Linear."""
    k, n = shapes_of(setting)[0]
    for m in (1, 64, 4096) if not setting.quick else QUICK_ROWS:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=setting.device)
        dense = torch.randn(n, k, dtype=torch.bfloat16, device=setting.device)
        cases: dict[str, Callable[[], Tensor]] = {}
        cases["dense"] = lambda x=x, w=dense: F.linear(x, w)
        for title in LAYERS:
            layer = make_layer(title, n, k, setting.device, bias=False)
            cases[title] = lambda layer=layer, x=x: layer(x)
        for name, call in cases.items():
            try:
                names = launches(call, setting.device)
                more = temporary_bytes(call, setting.device)
            except Exception as failure:
                yield Missing(f"{name}, M = {m}", first_line(failure))
                continue
            yield {
                "layer": name,
                "M": m,
                "launches": len(names),
                "temporaries, MB": None if more is None else more / 1e6,
                "kernels": "; ".join(name[:40] for name in names[:6]),
            }


# -- a model ---------------------------------------------------------------------------


def model(setting: Setting) -> Iterator[Row | Missing]:
    """A step of some layers of Qwen-Image, dense and quantized."""
    schemes.register_all()
    width, layers, tokens, text = (3072, 6, 4096, 128)
    if setting.quick:
        width, layers, tokens, text = (256, 1, 64, 8)
    words: Any = {"dtype": torch.bfloat16, "device": setting.device}
    with torch.device(setting.device):
        dense = Model(width, layers).to(torch.bfloat16).requires_grad_(False)
    img, txt = (torch.randn(count, width, **words) for count in (tokens, text))
    time = torch.randn(1, width, **words)
    expected = dense(img, txt, time).float()
    models: dict[str, Any] = {"dense": dense}
    for title, (scheme, options) in LAYERS.items():
        try:
            quantized = copy.deepcopy(dense)
            hijack.wrap_model(quantized, scheme, include="*", **options)
            quantized(img, txt, time)
        except Exception as failure:
            yield Missing(title, first_line(failure))
        else:
            models[title] = quantized
    runs = {
        name: lambda _, each=each: each(img, txt, time) for name, each in models.items()
    }
    seconds = alternate(runs, setting.rounds_or(5), 2)
    for name, each in seconds.items():
        error = (models[name](img, txt, time).float() - expected).norm()
        yield {
            "model": f"{name}, {layers} layers, {tokens} tokens",
            "ms": milliseconds(each),
            "over dense": ratio(each, seconds["dense"]),
            "error": f"{float(error / expected.norm()):.2%}",
        }


# -- quantizing ------------------------------------------------------------------------


def quantize(setting: Setting) -> Iterator[Row | Missing]:
    """Quantizing one weight, beside musubi-tuner's ``quantize_weight``."""
    schemes.register_all()
    scheme = hijack.schemes()["blockwise_fp8"]
    n, k = (512, 256) if setting.quick else (12288, 3072)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=setting.device)
    peer, modes = musubi(), {"1x64": "block", "row": "channel", "tensor": "tensor"}
    if peer is None:
        yield Missing("musubi-tuner", no_musubi() or "")
    for block in ("1x64", "128x128", "row", "tensor"):
        for count in (0, 32):
            runs: dict[str, Callable[[int], object]] = {
                "hijack": lambda _, b=block, c=count: scheme.quantize(
                    weight, block_size=b, scale_search=c
                )
            }
            if peer is not None and block in modes and not count:
                runs["musubi-tuner"] = lambda _, mode=modes[block]: (
                    peer.quantize_weight(
                        *("w", weight, torch.float8_e4m3fn, 448.0, -448.0, mode, 64)
                    )
                )
            seconds = alternate(runs, setting.rounds_or(ROUNDS), 5)
            row: dict[str, Any] = {"blocks": block, "candidates": count}
            row["ms"] = milliseconds(seconds["hijack"])
            if "musubi-tuner" in seconds:
                faster = ratio(seconds["musubi-tuner"], seconds["hijack"])
                row["musubi-tuner / hijack"] = faster
            yield row


FORWARD = Benchmark(
    "forward",
    "Time of a Linear with an FP8 weight over the same in bfloat16.",
    inferring(forward),
    "musubi-tuner for its column",
    usable,
    Chart("M", ("layer", "block"), "time / bfloat16"),
    budget=75,
)
FORMATS = Benchmark(
    "formats",
    "Time of a Linear of every format over the same in bfloat16; W8A8 quantizes the "
    "input too.",
    inferring(formats),
    refuses=usable,
    chart=Chart("M", ("layer",), "time / bfloat16"),
    budget=45,
)
KERNELS = Benchmark(
    "kernels",
    "Time of each kernel's product of 3072 -> 12288 over bfloat16.",
    inferring(forward_of_kernels),
    refuses=usable,
    chart=Chart("M", ("weight",), "time / bfloat16"),
    budget=60,
)
LORA = Benchmark(
    "lora",
    "Time of an FP8 Linear with LoRAs of rank 32 over the same without.",
    inferring(lora),
    refuses=usable,
    budget=30,
)
LAUNCHES = Benchmark(
    "launches",
    "Kernels that a forward of 3072 -> 12288 starts, and what it allocates beside its "
    "result.",
    inferring(counted),
    refuses=usable,
    budget=40,
)
MODEL = Benchmark(
    "model",
    "A step of layers of Qwen-Image's shapes, in plain torch.",
    inferring(model),
    refuses=usable,
    budget=60,
)
QUANTIZE = Benchmark(
    "quantize",
    "Quantizing a bfloat16 weight of 12288 x 3072 on the device.",
    inferring(quantize),
    "musubi-tuner for its column",
    usable,
    budget=30,
)
