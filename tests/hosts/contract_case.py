"""Run by tests in a fresh process: the contract in one real ComfyUI.

Usage: contract_case.py COMFYUI FOLDER [CHECK ...]

Every check works with a registry of its own. Those on a device come last: it is a
double (see ``device_double``), as is comfy_aimdo's native half where the release has
dynamic VRAM. Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: E402 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "comfyui")]
sys.path.insert(0, str(HERE))

import comfy_harness

CHOSEN = sys.argv[3:]
DYNAMIC = comfy_harness.has_dynamic_vram(Path(sys.argv[1]))
if DYNAMIC:
    import aimdo_double

    aimdo_double.prepare()

import comfy_case as case  # prepares ComfyUI
import comfy_models
import contract_schemes
import dialect_case
import loaders_files
import lora_case
from comfy_case import LAYER, comfy, error
from contract_schemes import CALLS
from recording_plugin import ORDER, Recorder
from safetensors.torch import load_file, save_file

import hijack
import schemes.blockwise_fp8 as fp8
from hijack.claim import Claim
from hijack.formats.native_marker import write_marker
from hijack.hosts.comfyui import quantize
from hijack.hosts.comfyui.linear import LIVE
from hijack.hosts.comfyui.saving import save_model
from hijack.quantized import QuantizationConfig, QuantizedTensor
from hijack.registry import create_registry, use_registry

CPU = torch.device("cpu")
KEY = f"diffusion_model.{LAYER}.weight"
NUMBERS = itertools.count()
SCHEMES = {
    name: getattr(contract_schemes, name)()
    for name in (
        *("Rows", "Doubled", "Counting", "Activation", "Ranked", "Declining"),
        *("Tables", "Nibbles", "DottedRows", "Slow"),
    )
}
found = {}


# -- registries and files --------------------------------------------------------------


@contextlib.contextmanager
def asking(*plugins, names=("Rows",)):
    """A registry with block-wise FP8, some schemes and some plugins in force."""
    registry = create_registry()
    registry.register(fp8.SCHEME)
    for name in names:
        registry.register(SCHEMES[name])
    for number, plugin in enumerate(plugins):
        registry.add_plugin(plugin, f"plugin{number}")
    with use_registry(registry):
        yield registry


def write(tensors, metadata=None):
    """A new file."""
    path = str(case.FOLDER / f"contract-{next(NUMBERS)}.safetensors")
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path


def write_scheme(dense, scheme):
    """A file of a scheme, with hijack's marker, and what it means."""
    quantized_sd, meant, marked = case.with_scheme(dense, scheme)
    return write(quantized_sd, {"hijack": write_marker(marked)}), meant


def load(path):
    """A ModelPatcher of the stock loader."""
    return comfy.sd.load_diffusion_model(path)


def layer_of(patcher):
    """The layer that is looked at."""
    return patcher.get_model_object(f"diffusion_model.{LAYER}")


def weight_of(module):
    """The quantized weight of a layer."""
    return module.host_tensors.unwrap(module.weight)


def quantized_layers(patcher):
    """Name to quantized layer."""
    network = patcher.model.diffusion_model
    return {name: m for name, m in network.named_modules() if m in LIVE}


# -- which questions are asked ---------------------------------------------------------


def judge(recorder, layers, scheme, online):
    """What is wrong with the questions about the layers of a model."""
    wrong = []
    asked = recorder.by_module()
    if {prefix[:-1] for prefix in asked} != set(layers):
        wrong.append(f"layers {sorted(set(map(str, asked)) ^ set(layers))[:3]}")
    for prefix, questions in asked.items():
        hooks = [hook for hook, _ in questions]
        if hooks != list(ORDER):
            wrong.append(f"{prefix} {hooks}")
            continue
        select, create, bind, init = (arguments for _, arguments in questions)
        modules = {id(arguments["module"]) for _, arguments in questions}
        if len(modules) != 1 or not isinstance(init["module"], torch.nn.Linear):
            wrong.append(f"{prefix} module")
        if init["module"] not in LIVE or type(init["module"].weight) is torch.Tensor:
            wrong.append(f"{prefix} is not quantized")
        if {create["scheme"], bind["scheme"], init["scheme"]} != {scheme}:
            wrong.append(f"{prefix} scheme")
        if create["prefix"] != prefix:
            wrong.append(f"{prefix} prefix")
        if online:
            if select["header"] is not None or create["state_dict"] is not None:
                wrong.append(f"{prefix} header or state dict where there is none")
        else:
            keys = [k for k in select["header"].tensors if k.startswith(prefix)]
            if len(keys) < 2 or f"{prefix}weight" not in keys:
                wrong.append(f"{prefix} header {keys}")
            if not all(key in create["state_dict"] for key in keys):
                wrong.append(f"{prefix} state dict")
    return wrong[:5]


class ClassThen:
    """Notes what a module was when each question about it was asked."""

    def __init__(self):
        self.classes = {}

    def __call__(self, module, **_):
        quantized = "Quantized" in type(module).__name__
        self.classes.setdefault(quantized, set()).add(type(module).__name__)


def check_questions(bf16, quantized_sd):
    """Each way a model gets quantized layers asks the same, in the same order."""
    path, dense_path = write(quantized_sd), write(bf16)
    config = QuantizationConfig.of(fp8.SCHEME, {"block_size": (1, 64)})
    claimed = {
        k.removesuffix(".scale_weight") for k in quantized_sd if "scale_weight" in k
    }
    ways = {
        "stock loader": lambda: load(path),
        "second load": lambda: load(path),
        "load quantized": lambda: quantize.load_quantized(dense_path, config),
        "quantize model": lambda: quantize.quantize_model(load(dense_path), config),
        "quantize again": lambda: quantize.quantize_model(load(path), config),
    }
    result = found["questions"] = {}
    for name, make in ways.items():
        before, after = ClassThen(), ClassThen()
        recorder = Recorder(
            select_scheme=before, create_params=before, bind_forward=before, init=after
        )
        with asking(recorder):
            if name == "quantize again":
                source = load(path)
                recorder.asked.clear()
                patcher = quantize.quantize_model(source, config)
            else:
                patcher = make()
            online = "load" not in name or "quantized" in name
            layers = quantized_layers(patcher)
            result[name] = {
                "layers": len(layers),
                "claimed": len(claimed),
                "wrong": judge(recorder, layers, fp8.SCHEME, online),
                "identify": len(recorder.named("identify")),
                "dense before": set(before.classes) == {False},
                "quantized after": set(after.classes) == {True},
            }
            recorder.asked.clear()
            case.first_output(patcher)
            case.first_output(case.with_lora(patcher, case.lora(bf16, 0.5)), 1000)
            clone = patcher.clone()
            result[name]["later"] = [hook for hook, _ in recorder.asked]
            recorder.asked.clear()
            module = layer_of(clone)
            twin = copy.deepcopy(module)
            result[name]["copy"] = [hook for hook, _ in recorder.asked]
            result[name]["copy is told"] = all(
                arguments["module"] is twin and arguments["scheme"] is fp8.SCHEME
                for _, arguments in recorder.asked
            )
    check_text_encoder_questions()


def check_text_encoder_questions():
    """A text encoder asks like a diffusion model."""
    quantized_sd, _ = loaders_files.musubi(
        loaders_files.text_encoder("t5"), loaders_files.is_linear
    )
    recorder = Recorder()
    with asking(recorder):
        clip = loaders_files.load_clip(quantized_sd, kind="MOCHI")
    network = clip.cond_stage_model
    names = {
        name.partition("transformer.")[2]: module
        for name, module in network.named_modules()
        if module in LIVE
    }
    found["questions"]["text encoder"] = {
        "layers": len(names),
        "claimed": sum("scale_weight" in key for key in quantized_sd),
        "wrong": judge(recorder, names, fp8.SCHEME, False),
        "identify": len(recorder.named("identify")),
    }


# -- what answers do -------------------------------------------------------------------


class Lines(logging.Handler):
    """Keeps what hijack warns of while it is open."""

    def __enter__(self):
        self.lines = []
        logging.getLogger("hijack").addHandler(self)
        return self

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())

    def __exit__(self, *_):
        logging.getLogger("hijack").removeHandler(self)


def check_answers(bf16):
    """What a plugin answers is what the layer becomes."""
    path, meant = write_scheme(bf16, SCHEMES["Rows"])
    weight = meant[f"{LAYER}.weight"]
    calls = []

    def claim(module, prefix, header):
        if prefix[:-1] != LAYER:
            return None
        keys = {"weight": f"{prefix}weight", "row_scale": f"{prefix}row_scale"}
        return Claim(LAYER, "contract_doubled", "hijack", keys)

    def tensors(module, scheme, prefix, state_dict):
        if prefix[:-1] != LAYER:
            return None
        scale = state_dict[f"{prefix}row_scale"]
        return state_dict[f"{prefix}weight"], {"row_scale": 3 * scale}

    def forward(module, input, weight, bias):
        calls.append(module)
        return F.linear(input, weight.dense(input.dtype), bias)

    result = found["answers"] = {}
    expected = case.first_output(case.load(meant))
    names = ("Rows", "Doubled")
    with asking(Recorder(select_scheme=claim), names=names):
        quantized = weight_of(layer_of(load(path)))
        result["claim"] = [
            quantized.scheme.name,
            error(quantized.dense(torch.float32), 2 * weight),
        ]
    with asking(Recorder(create_params=tensors)):
        patcher = load(path)
        result["tensors"] = error(
            weight_of(layer_of(patcher)).dense(torch.float32), 3 * weight
        )
    with asking(Recorder(bind_forward=lambda **_: forward)):
        patcher = load(path)
        output = case.first_output(patcher)
        layers = quantized_layers(patcher)
        result["forward"] = error(output, expected)
        result["calls"] = len(calls) == len(layers) == len(set(map(id, calls)))
    check_online_answers(bf16, result)


def check_online_answers(bf16, result):
    """The same where no file decides: the answer is a scheme, or the name of one."""
    path = write(bf16)
    config = QuantizationConfig.of(SCHEMES["Rows"])
    ways = {
        "load quantized": lambda: quantize.load_quantized(path, config),
        "quantize model": lambda: quantize.quantize_model(load(path), config),
    }
    dense = bf16[f"{LAYER}.weight"]
    given = SCHEMES["Rows"].quantize(3 * dense.float())
    for name, make in ways.items():
        recorder = Recorder(select_scheme=lambda **_: "contract_doubled")
        with asking(recorder, names=("Rows", "Doubled")):
            quantized = weight_of(layer_of(make()))
            expected = SCHEMES["Doubled"].dequantize(
                *SCHEMES["Doubled"].quantize(dense.float()), torch.float32
            )
            result[f"{name}: scheme"] = [
                quantized.scheme.name,
                error(quantized.dense(torch.float32), expected) < 0.01,
            ]
        answer = lambda prefix, **_: given if prefix[:-1] == LAYER else None  # noqa: E731
        with asking(Recorder(create_params=answer)):
            quantized = weight_of(layer_of(make()))
            result[f"{name}: tensors"] = torch.equal(quantized.qdata, given[0])


def fail(**_):
    """What a plugin of bad quality does."""
    raise RuntimeError("out of ideas")


def check_failures(bf16):
    """A failing plugin stops no load, is told of once, and is an error if strict."""
    path, meant = write_scheme(bf16, SCHEMES["Rows"])
    expected = case.first_output(case.load(meant))
    result = found["failures"] = {}
    for hook in ("identify", *ORDER):
        entry = result[hook] = {}
        with asking(Recorder(**{hook: fail})) as registry, Lines() as log:
            patcher = load(path)
            entry["error"] = error(case.first_output(patcher), expected)
            entry["lines"] = len([line for line in log.lines if "ideas" in line])
            entry["problems"] = len(registry.problems)
            entry["line"] = str(registry.problems[0])
            copy.deepcopy(layer_of(patcher))
            del patcher
        gc.collect()
        alive = len(LIVE)
        with asking(Recorder(**{hook: fail})):
            os.environ["HIJACK_STRICT"] = "1"
            try:
                load(path)
                entry["strict"] = "nothing was raised"
            except Exception as caught:
                entry["strict"] = f"{type(caught).__name__}: {caught}"
            finally:
                del os.environ["HIJACK_STRICT"]
        gc.collect()
        entry["left alive"] = len(LIVE) - alive
        with asking():
            entry["next load"] = error(case.first_output(load(path)), expected)
    check_half_changed(bf16)


def check_half_changed(bf16):
    """A layer whose plugin fails under HIJACK_STRICT is what it was before."""
    from hijack.hosts.comfyui.operations import make_operations

    scheme, base = SCHEMES["Rows"], comfy.ops.disable_weight_init
    dense = bf16[f"{LAYER}.weight"].float()
    config = QuantizationConfig.of(scheme, {}, "hijack")
    weight = QuantizedTensor(*scheme.quantize(dense), config)
    result = found["half changed"] = {}
    for hook in ORDER:
        linear = make_operations(base, torch.float32).Linear(256, 256)
        with asking(Recorder(**{hook: fail})):
            os.environ["HIJACK_STRICT"] = "1"
            try:
                linear.load_state_dict({"weight": weight}, strict=False)
            except hijack.HijackError:
                pass
            else:
                result[hook] = "nothing was raised"
                continue
            finally:
                del os.environ["HIJACK_STRICT"]
        linear.load_state_dict({"weight": dense, "bias": torch.zeros(256)})
        x = torch.randn(3, 256)
        same = torch.equal(linear(x), F.linear(x, dense, torch.zeros(256)))
        result[hook] = [type(linear) is base.Linear, same, linear not in LIVE]


# -- the forward that runs -------------------------------------------------------------

LORAS = ("none", "plain", "dora", "loha", "diff")


class Forwards:
    """One scheme's model, and what its layer computes with each LoRA.

    Everything that is expected is computed on the CPU, without ComfyUI's layers.
    """

    def __init__(self, name, bf16):
        self.scheme = SCHEMES[name]
        self.path, self.meant = write_scheme(bf16, self.scheme)
        kinds = lora_case.kinds(self.meant)
        self.loras = {kind: kinds[kind] for kind in LORAS if kind != "none"}
        generator = torch.Generator().manual_seed(9)
        self.x = torch.randn(2, 7, 256, generator=generator)
        self.patcher = load(self.path)
        self.count = len(quantized_layers(self.patcher))
        self.forward = self.scheme.bind_forward(None) or default_forward
        self.expected = {kind: self._expect(kind) for kind in LORAS}

    def _expect(self, kind):
        dense = self.meant[f"{LAYER}.weight"]
        module = layer_of(self.patcher)
        bias = module.bias.to(torch.float32)
        qdata, params = self.scheme.quantize(self.source())
        weight = QuantizedTensor(qdata, params, QuantizationConfig.of(self.scheme))
        output = self.forward(None, self.x, weight, bias)
        CALLS.clear()
        if kind == "none":
            return output
        patches = self.with_lora(kind).patches[KEY]
        changed = comfy.lora.calculate_weight(patches, dense.clone(), KEY)
        return output + F.linear(self.x, changed - dense)

    def source(self):
        """The layer's weight before it was quantized."""
        return BF16[f"{LAYER}.weight"].float()

    def with_lora(self, kind):
        """The model with a LoRA, or as it is."""
        if kind == "none":
            return self.patcher
        return case.with_lora(self.patcher, self.loras[kind])

    def run(self, mode, enter, result):
        """Each LoRA in one mode of ComfyUI's memory, and the model without again.

        Args:
            mode: its name.
            enter: brings a ModelPatcher into it.
            result: where to put what was found.
        """
        device = self.patcher.load_device
        clean = None
        for kind in LORAS:
            patcher = self.with_lora(kind)
            enter(patcher)
            CALLS.clear()
            output = layer_of(patcher)(self.x.to(device)).to(CPU)
            entry = result[f"{mode}, {kind}"] = {
                "error": error(output, self.expected[kind])
            }
            if self.scheme is SCHEMES["Counting"]:
                entry["calls"] = len(CALLS)
                entry["devices"] = sorted(set().union(*CALLS))
                entry["device"] = str(device)
            if kind == "none":
                clean = output
                continue
            patcher.detach()
            enter(self.patcher)
            again = layer_of(self.patcher)(self.x.to(device)).to(CPU)
            entry["removed"] = torch.equal(again, clean)
        if self.scheme is SCHEMES["Counting"]:
            enter(self.patcher)
            CALLS.clear()
            network_output(self.patcher)
            result[f"{mode}, none"]["network"] = [len(CALLS), self.count]


def default_forward(module, input, weight, bias):
    """What a layer computes whose scheme has no forward."""
    return F.linear(input, weight.dense(input.dtype), bias)


def network_output(patcher):
    """The network's output with the weights as they are loaded."""
    device = patcher.load_device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, 1, 8, 8), generator=generator).to(device)
    context = torch.randn((1, 7, 192), generator=generator).to(device)
    step = torch.tensor([0.7]).to(device)
    return patcher.model.apply_model(x, step, c_crossattn=context).to(CPU)


def enter_full(patcher):
    """All weights loaded."""
    comfy.model_management.load_models_gpu([patcher])


def enter_low(patcher):
    """No room for any weight."""
    comfy.model_management.unload_all_models()
    patcher.partially_load(patcher.load_device, 1000)


def patching(memory):
    """Brings a model to the device with so much room for weights; 0 is no limit."""
    last = []

    def enter(patcher):
        for other in last:  # they share the network
            other.unpatch_model(CPU)
        last[:] = [patcher]
        patcher.patch_model(patcher.load_device, lowvram_model_memory=memory(patcher))

    return enter


def dynamic(mode):
    """Dynamic VRAM with room for all weights, none, or half of them."""

    def enter(patcher):
        memory = aimdo_double.MEMORY
        memory.evict()
        half = patcher.model_size() // 2
        memory.limit = {"all": None, "none": 0, "half": half}[mode]
        comfy.model_management.load_models_gpu([patcher])

    return enter


def check_forwards(bf16):
    """The forward that was bound is what runs, however weights are loaded."""
    result = found["forwards"] = {}
    names = ("Rows", "Counting", "Activation")
    with asking(names=names):
        for name in names:
            forwards = Forwards(name, bf16)
            modes = result[name] = {}
            forwards.run("full", enter_full, modes)
            forwards.run("low VRAM", enter_low, modes)
            dense = error(
                default_forward(
                    None,
                    forwards.x,
                    weight_of(layer_of(forwards.patcher)),
                    layer_of(forwards.patcher).bias.float(),
                ),
                forwards.expected["none"],
            )
            modes["effect of the forward"] = dense
            expected = case.first_output(case.load(forwards.meant))
            modes["network"] = error(case.first_output(forwards.patcher), expected)
            forwards.patcher = None
        ON_DEVICE.update({name: Forwards(name, bf16) for name in names})


ON_DEVICE = {}


def check_forwards_on_device():
    """The same with an input on a device and weights that are there, or are not."""
    import device_double

    management = comfy.model_management
    if not DYNAMIC:
        device_double.start()
        import aimdo_double as double

        double.prepare_cuda()
    management.get_torch_device = lambda: device_double.DEVICE
    management.vram_state = management.VRAMState.NORMAL_VRAM
    modes = {
        "device, full": patching(lambda patcher: 0),
        "device, half": patching(lambda patcher: patcher.model_size() // 2),
        "device, none": patching(lambda patcher: 1),
    }
    run_modes(modes)
    management.unload_all_models()
    if DYNAMIC:
        aimdo_double.enable()
        run_modes({f"dynamic, {m}": dynamic(m) for m in ("all", "none", "half")})
        check_dynamic_merging()
        check_dynamic_on_cpu()


def run_modes(modes):
    """All schemes in some modes, each of a model loaded anew."""
    with asking(names=tuple(ON_DEVICE)):
        for name, forwards in ON_DEVICE.items():
            forwards.patcher = load(forwards.path)
            for mode, enter in modes.items():
                forwards.run(mode, enter, found["forwards"][name])
                forwards.patcher.unpatch_model(CPU)
            forwards.patcher = None


def check_dynamic_merging():
    """A LoRA that is merged on demand is the same in every step."""
    from hijack.hosts.comfyui.lora import Merge

    forwards = ON_DEVICE["Counting"]
    with asking(names=("Counting",)):
        forwards.patcher = load(forwards.path)
        marked = forwards.with_lora("plain")
        marked.patches = {k: [Merge(p) for p in v] for k, v in marked.patches.items()}
        x, outputs = forwards.x.to(marked.load_device), []
        dynamic("all")(marked)
        CALLS.clear()
        for _ in range(3):
            outputs.append(layer_of(marked)(x).to(CPU))
        found["dynamic merging"] = {
            "calls": len(CALLS),
            "same": all(torch.equal(o, outputs[0]) for o in outputs),
            "error": error(outputs[0], forwards.expected["plain"]),
        }


def check_dynamic_on_cpu():
    """A layer that is used on the CPU all the same runs its forward there."""
    forwards = ON_DEVICE["Counting"]
    with asking(names=("Counting",)):
        forwards.patcher = load(forwards.path)
        changed = forwards.with_lora("plain")
        dynamic("all")(changed)
        CALLS.clear()
        output = layer_of(changed)(forwards.x)
        found["dynamic on CPU"] = {
            "calls": len(CALLS),
            "error": error(output, forwards.expected["plain"]),
        }


# -- files -----------------------------------------------------------------------------


def skeleton(dense):
    """Modules of plain torch with the names of a model; 2-D weights are of Linears."""
    root = torch.nn.Module()
    for key, tensor in dense.items():
        layer, _, name = key.rpartition(".")
        if name == "bias" and dense.get(f"{layer}.weight", tensor).ndim == 2:
            continue
        owner = root
        parts = layer.split(".") if layer else []
        if name == "weight" and tensor.ndim == 2:
            *parts, last = parts
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        if name == "weight" and tensor.ndim == 2:
            biased = f"{layer}.bias" in dense
            n, k = tensor.shape
            owner.add_module(last, torch.nn.Linear(k, n, biased, device="meta"))
        else:
            owner.register_parameter(
                name, torch.nn.Parameter(torch.empty_like(tensor, device="meta"))
            )
    return root


def loads_in_torch(path, dense, kinds):
    """Whether plain torch reads a file: layers of each scheme, and the weights."""
    model = skeleton(dense)
    hijack.load(model, path)
    wrong = []
    for layer, scheme in kinds.items():
        weight = model.get_submodule(layer).weight
        if not isinstance(weight, QuantizedTensor) or weight.scheme is not scheme:
            wrong.append(f"{layer} {type(weight).__name__}")
        elif not torch.equal(weight.dense(torch.float32), dense[f"{layer}.weight"]):
            wrong.append(f"{layer} weight")
    return wrong[:5]


def saves(patcher, name):
    """The files that ComfyUI's save node and ours write, keys as in the network."""
    paths = {}
    for way, memory in (("ModelSave", None), ("ModelSave, low VRAM", 1000)):
        case.first_output(patcher, memory)
        paths[way] = str(case.FOLDER / f"{name}-{next(NUMBERS)}.safetensors")
        comfy.sd.save_checkpoint(paths[way], patcher)
    paths["our node"] = str(case.FOLDER / f"{name}-{next(NUMBERS)}.safetensors")
    save_model(patcher, Path(paths["our node"]))
    return paths


def stripped(path):
    """A file without ComfyUI's prefix in front of its keys, marker included."""
    from hijack.safetensors_io.reader import open_tensors, read_header

    header = read_header(path)
    tensors, metadata = open_tensors(header), dict(header.metadata)
    prefix = case.PREFIX
    if "hijack" in metadata:
        layers = json.loads(metadata["hijack"])["layers"]
        metadata["hijack"] = write_marker(
            {layer.removeprefix(prefix): entry for layer, entry in layers.items()}
        )
    return write(
        {key.removeprefix(prefix): tensors[key] for key in header.tensors}, metadata
    )


def round_trip(name, path, meant, kinds, bf16):
    """Load a file, with a LoRA and without, save it both ways, and load that."""
    result = {}
    reference = case.load(meant)
    expected = case.first_output(reference)
    made = case.lora(meant, 0.5)
    changed = case.first_output(case.with_lora(reference, made))
    patcher = load(path)
    layers = quantized_layers(patcher)
    result["layers"] = [len(layers), len(kinds)]
    result["error"] = error(case.first_output(patcher), expected)
    ours = case.with_lora(patcher, made)
    result["lora"] = error(case.first_output(ours), changed)
    result["lora, low VRAM"] = error(case.first_output(ours, 1000), changed)
    result["effect"] = error(changed, expected)
    ours.detach()
    state_dict = patcher.model.diffusion_model.state_dict()
    result["live"] = sorted(
        {
            f"{kinds[layer].name}: {key.removeprefix(f'{layer}.')}"
            for layer in kinds
            for key in state_dict
            if key.startswith(f"{layer}.") and not key.endswith(".bias")
        }
    )
    result["merged"] = merges(patcher, bf16, meant)
    original = load_file(path)
    for way, saved in saves(patcher, name).items():
        entry = result[way] = {}
        file = load_file(saved)
        keys = {key.removeprefix(case.PREFIX) for key in file}
        entry["keys"] = sorted(keys ^ set(original))[:4]
        again = load(saved)
        entry["error"] = error(case.first_output(again), expected)
        entry["schemes"] = kinds == {
            layer: weight_of(module).scheme
            for layer, module in quantized_layers(again).items()
        }
        entry["torch"] = loads_in_torch(stripped(saved), meant, kinds)
    check_lora_saving(patcher, made, changed, result, name)
    return result


def merges(patcher, bf16, meant):
    """ModelMergeSimple with an ordinary model, either being the first."""
    other = {key: tensor.flip(0) for key, tensor in bf16.items()}
    reference, second = case.load(meant), case.load(other)
    errors = []
    for pairs in (
        ((patcher, second), (reference, second)),
        ((second, patcher), (second, reference)),
    ):
        outputs = []
        for one, two in pairs:
            merged = one.clone()
            for key, patch in two.get_key_patches("diffusion_model.").items():
                merged.add_patches({key: patch}, 0.3, 0.7)
            outputs.append(case.first_output(merged))
            merged.detach()
        errors.append(error(*outputs))
    return errors


def check_lora_saving(patcher, made, changed, result, name):
    """A LoRA that is saved in the file has its effect there."""
    ours = case.with_lora(patcher, made)
    for way, saved in saves(ours, f"{name}-lora").items():
        result[way]["lora"] = error(case.first_output(load(saved)), changed)
    ours.detach()


def check_dialects(bf16):
    """A LoRA and saving work whatever a dialect calls the quantized data."""
    result = found["dialects"] = {}
    with asking(names=("Rows", "Nibbles", "DottedRows")):
        for name in ("torchao", "quanto"):
            spell, extra, metadata = dialect_case.dialects(bf16)[name]
            quantized_sd, dense, kinds = dict(extra), {}, {}
            for key, tensor in bf16.items():
                quantized_sd[key] = dense[key] = tensor
                if comfy_models.is_quantized(key, tensor):
                    layer = key.removesuffix(".weight")
                    del quantized_sd[key]
                    made, dense[key] = spell(layer, tensor)
                    quantized_sd |= {
                        f"{layer}.{suffix}": t for suffix, t in made.items()
                    }
                    kinds[layer] = fp8.SCHEME
            result[name] = round_trip(
                name, write(quantized_sd, metadata), dense, kinds, bf16
            )
        scheme = SCHEMES["DottedRows"]
        quantized_sd, dense, marked = case.with_scheme(bf16, scheme)
        for layer in marked:
            tensors = {"row_scale": quantized_sd.pop(f"{layer}.row_scale")}
            qdata = quantized_sd.pop(f"{layer}.weight")
            spelled = scheme.dialects[0].encode(qdata, tensors, {})
            quantized_sd |= {f"{layer}.{suffix}": t for suffix, t in spelled.items()}
        kinds = dict.fromkeys(marked, scheme)
        result["dotted"] = round_trip("dotted", write(quantized_sd), dense, kinds, bf16)
        scheme = SCHEMES["Nibbles"]
        path, dense = write_scheme(bf16, scheme)
        kinds = dict.fromkeys(marked, scheme)
        result["native dots"] = round_trip("nibbles", path, dense, kinds, bf16)


def check_mixed(bf16, quantized_sd):
    """Two and three schemes in one file are saved and loaded again, all of them."""
    result = found["mixed"] = {}
    exact = case.exact(quantized_sd)
    for name, names in (("two", ("Rows",)), ("three", ("Rows", "Nibbles"))):
        schemes_ = [fp8.SCHEME, *(SCHEMES[n] for n in names)]
        file, meant, marked, kinds = {}, {}, {}, {}
        layers = [
            key.removesuffix(".weight")
            for key, tensor in bf16.items()
            if comfy_models.is_quantized(key, tensor)
        ]
        for number, layer in enumerate(layers):
            kinds[layer] = schemes_[number % len(schemes_)]
        for key, tensor in bf16.items():
            layer, _, suffix = key.rpartition(".")
            scheme = kinds.get(layer) if suffix == "weight" else None
            file[key] = meant[key] = tensor
            if scheme is fp8.SCHEME:
                scale = f"{layer}.scale_weight"
                file[key], file[scale], meant[key] = (
                    quantized_sd[key],
                    quantized_sd[scale],
                    exact[key],
                )
            elif scheme is not None:
                file[key], params = scheme.quantize(tensor.float())
                file |= {f"{layer}.{n}": t for n, t in params.items()}
                meant[key] = scheme.dequantize(file[key], params, torch.float32)
                marked[layer] = {"scheme": scheme.name, "params": list(params)}
        with asking(names=names):
            path = write(file, {"hijack": write_marker(marked)})
            result[name] = round_trip(name, path, meant, kinds, bf16)


def check_options(bf16):
    """Options, declined layers and targets in what our nodes run."""
    result = found["options"] = {}
    dense_path = write(bf16)
    with asking(names=("Ranked", "Declining", "Tables")):
        config = QuantizationConfig.of(SCHEMES["Ranked"], {"rank": 4})
        dense = load(dense_path)
        patchers = {
            "quantize model": quantize.quantize_model(dense, config),
            "load quantized": quantize.load_quantized(dense_path, config),
        }
        for name, patcher in patchers.items():
            entry = result[name] = {"rank": ranks(patcher)}
            output = case.first_output(patcher)
            for way, path in saves(patcher, "ranked").items():
                again = load(path)
                entry[way] = [ranks(again), error(case.first_output(again), output)]
        changed = case.with_lora(patchers["quantize model"], case.lora(bf16, 0.5))
        path = str(case.FOLDER / "ranked-lora.safetensors")
        save_model(changed, Path(path))
        result["with a LoRA"] = ranks(load(path))
        try:
            quantize.quantize_model(
                dense, QuantizationConfig.of(SCHEMES["Ranked"], {"rnak": 4})
            )
        except Exception as caught:
            result["typo"] = f"{type(caught).__name__}: {caught}"
        config = QuantizationConfig.of(SCHEMES["Declining"])
        for name, patcher in {
            "declined, quantize model": quantize.quantize_model(dense, config),
            "declined, load quantized": quantize.load_quantized(dense_path, config),
        }.items():
            layers = quantized_layers(patcher)
            shapes = {tuple(module.weight.shape) for module in layers.values()}
            finite = bool(case.first_output(patcher).isfinite().all())
            result[name] = [len(layers), all(n >= k for n, k in shapes), finite]
        config = QuantizationConfig.of(SCHEMES["Tables"])
        for name, make in {
            "targets, quantize model": lambda: quantize.quantize_model(dense, config),
            "targets, load quantized": lambda: quantize.load_quantized(
                dense_path, config
            ),
        }.items():
            try:
                make()
            except Exception as caught:
                result[name] = f"{type(caught).__name__}: {caught}"
        path, meant = write_scheme(bf16, SCHEMES["Tables"])
        patcher = load(path)
        expected = case.first_output(case.load(meant))
        result["targets, file"] = [
            len(quantized_layers(patcher)),
            error(case.first_output(patcher), expected),
        ]


def ranks(patcher):
    """The ranks that a model's layers have, and say they have."""
    return sorted(
        {
            (weight_of(m).qdata.shape[1], weight_of(m).options.get("rank"))
            for m in quantized_layers(patcher).values()
        }
    )


# -- threads ---------------------------------------------------------------------------


def check_threads(bf16):
    """Forwards in several threads at once each have the LoRA."""
    path, meant = write_scheme(bf16, SCHEMES["Slow"])
    result = found["threads"] = {}
    with asking(names=("Slow",)):
        made = case.lora(meant, 0.5)
        difference = {f"diffusion_model.{LAYER}.diff": torch.randn(256, 256)}
        patcher = case.with_lora(load(path), {**made, **difference})
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        for mode, enter in (("full", enter_full), ("low VRAM", enter_low)):
            enter(patcher)
            module = layer_of(patcher)
            expected = module(x)
            before = dict(vars(module))
            functions = list(module.weight_function)

            def forward(turn, module=module):
                if turn % 7 == 0:  # as when memory is asked back
                    module.drop_copies()
                with torch.inference_mode():
                    return module(x)

            with ThreadPoolExecutor(8) as pool:
                outputs = list(pool.map(forward, range(400)))
            after = dict(vars(module))
            result[mode] = {
                "wrong": sum(not torch.equal(o, expected) for o in outputs),
                "unchanged": before.keys() == after.keys()
                and all(before[name] is after[name] for name in before)
                and functions == module.weight_function,
            }
        sys.setswitchinterval(interval)


BF16 = {}


def main():
    """All checks; what they found is printed as the last line."""
    hijack.hosts.patch("comfyui")
    BF16.update(comfy_models.make_state_dict(comfy_models.small_qwen_shapes()))
    quantized_sd, _ = comfy_models.musubi(BF16)
    checks = {
        "questions": lambda: check_questions(BF16, quantized_sd),
        "answers": lambda: check_answers(BF16),
        "failures": lambda: check_failures(BF16),
        "dialects": lambda: check_dialects(BF16),
        "mixed": lambda: check_mixed(BF16, quantized_sd),
        "options": lambda: check_options(BF16),
        "threads": lambda: check_threads(BF16),
        "forwards": lambda: check_forwards(BF16),
        "on device": check_forwards_on_device,
    }
    for name in CHOSEN or checks:
        checks[name]()


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, others would only wait
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
