"""What one way to load block-wise FP8 files makes of them, in one ComfyUI.

::

    python -m benchmarks.comfyui_case musubi|hijack COMFYUI

Prints one JSON object: every step, and how far its result is from the right one, or why
it fails. `benchmarks.comfyui_musubi` makes a table of that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import COMFYUI_MUSUBI

REPOSITORY = Path(__file__).parents[1]
PREFIX = "model.diffusion_model."
#: Size of a LoRA's change relative to the weight's norm.
SMALL, LARGE = 0.05, 5.0


class Case:
    """One ComfyUI, with files in a folder, and one way to load them.

    Args:
        side: ``musubi`` or ``hijack``.
        folder: for files.
    """

    def __init__(self, side: str, folder: Path) -> None:
        import comfy.sd
        import comfy_models

        self.folder, self.make = folder, comfy_models
        bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
        self.encoded, self.exact = quantized(bf16, comfy_models.is_quantized)
        self.wan, self.exact_wan = quantized(
            comfy_models.make_state_dict(wan_shapes()), is_quantized_wan
        )
        self.load_stock = comfy.sd.load_diffusion_model
        self.reference = self.write("exact", self.exact)
        self.lora = {
            size: make_lora(self.exact, self.encoded, size) for size in (SMALL, LARGE)
        }
        self.expected: dict[str, Tensor] = {}
        self.expect()
        self.load = self.load_peer() if side == "musubi" else self.load_hijack()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a file that ComfyUI-musubi lists."""
        from safetensors.torch import save_file

        path = self.folder / f"{name}-musubi.safetensors"
        save_file(dict(tensors), path)
        return str(path)

    def expect(self) -> None:
        """Everything that is right, from dense weights, before anybody patches."""
        clean = self.load_stock(self.reference)
        self.expected["load and sample"] = sample(clean)
        self.expected["partial load"] = first_output(clean)
        for name, size in (("small LoRA", SMALL), ("large LoRA", LARGE)):
            self.expected[name] = sample(with_lora(clean, self.lora[size]))
        changed = with_lora(clean, self.lora[SMALL])
        self.expected["partial load, small LoRA"] = first_output(changed)
        wan = self.load_stock(self.write("exact-wan", self.exact_wan))
        self.expected["width not divisible by 64"] = sample(wan)

    def load_peer(self) -> Callable[[str], Any]:
        """ComfyUI-musubi's own loader node."""
        import folder_paths

        folder_paths.add_model_folder_path("diffusion_models", str(self.folder))
        node = import_pack(Path(os.environ[COMFYUI_MUSUBI])).NODE_CLASS_MAPPINGS[
            "MusubiUNETLoader"
        ]
        return lambda path: node().load_unet(Path(path).name, "fp8_e4m3fn")[0]

    def load_hijack(self) -> Callable[[str], Any]:
        """What ComfyUI's own loader node calls."""
        import hijack
        import schemes.blockwise_fp8  # noqa: F401

        status = hijack.patch("comfyui")
        if not status.patched:
            raise SystemExit(f"{status}")
        return self.load_stock

    # -- steps -------------------------------------------------------------------------

    def run(self) -> dict[str, str]:
        """Every step: what came of it, or why it fails."""
        path = self.write("block", self.encoded)
        steps: dict[str, Callable[[], str]] = {
            "load and sample": lambda: self.sampled("load and sample", path),
            "small LoRA": lambda: self.with_lora("small LoRA", path, SMALL),
            "large LoRA": lambda: self.with_lora("large LoRA", path, LARGE),
            "LoRA removed": lambda: self.removed(path),
            "partial load": lambda: self.partial(path),
            "partial load, small LoRA": lambda: self.partial_with_lora(path),
            "save and reload": lambda: self.saved(path),
            "prefixed file": lambda: self.sampled("load and sample", self.prefixed()),
            "width not divisible by 64": lambda: self.sampled(
                "width not divisible by 64", self.write("wan", self.wan)
            ),
        }
        return {name: outcome(step) for name, step in steps.items()}

    def sampled(self, name: str, path: str) -> str:
        """A file, loaded and sampled with."""
        return figure(error(sample(self.load(path)), self.expected[name]))

    def with_lora(self, name: str, path: str, size: float) -> str:
        """The same with a LoRA."""
        clean = self.load(path)
        without = sample(clean)
        output = sample(with_lora(clean, self.lora[size]))
        return self.judge(name, "load and sample", output, without)

    def removed(self, path: str) -> str:
        """The model after a LoRA was applied and taken away."""
        clean = self.load(path)
        output, weights = sample(clean), state(clean)
        changed = with_lora(clean, self.lora[SMALL])
        sample(changed)
        changed.detach()
        again, after = sample(clean), state(clean)
        differ = [key for key in weights if not same(weights[key], after.get(key))]
        if not differ and torch.equal(again, output):
            return "bit for bit"
        return f"{figure(error(again, output))}, {len(differ)} tensors differ"

    def partial(self, path: str) -> str:
        """Half of the weights offloaded."""
        output = first_output(self.load(path), half=True)
        return figure(error(output, self.expected["partial load"]))

    def partial_with_lora(self, path: str) -> str:
        """The same with a LoRA."""
        clean = self.load(path)
        without = first_output(clean, half=True)
        clean.detach()
        output = first_output(with_lora(clean, self.lora[SMALL]), half=True)
        return self.judge("partial load, small LoRA", "partial load", output, without)

    def saved(self, path: str) -> str:
        """ModelSave's file, loaded as the original was."""
        import comfy.model_management
        import comfy.sd

        model = self.load(path)
        comfy.model_management.load_models_gpu([model])
        target = str(self.folder / "saved-musubi.safetensors")
        comfy.sd.save_checkpoint(target, model)
        return self.sampled("load and sample", target)

    def prefixed(self) -> str:
        """A file as checkpoints spell their keys."""
        prefixed = {PREFIX + key: tensor for key, tensor in self.encoded.items()}
        return self.write("prefixed", prefixed)

    def judge(self, name: str, clean: str, output: Tensor, without: Tensor) -> str:
        """Error, and how much of a LoRA's change arrived."""
        right = (self.expected[name] - self.expected[clean]).double().flatten()
        change = (output - without).double().flatten()
        effect = float(change @ right / right.square().sum())
        return f"{figure(error(output, self.expected[name]))}, effect {effect:.2f}"


def quantized(
    dense: Mapping[str, Tensor], chosen: Callable[[str, Tensor], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Block-wise FP8 as musubi-tuner writes it, and what that means."""
    import comfy_models

    encoded, exact = dict(dense), dict(dense)
    for key, tensor in dense.items():
        if chosen(key, tensor):
            granularity = "row" if tensor.shape[1] % 64 else "block"
            qdata, scale, exact[key] = comfy_models.quantize(tensor, granularity)
            encoded[key], encoded[key.replace(".weight", ".scale_weight")] = (
                qdata,
                scale,
            )
    return encoded, exact


def is_quantized_wan(key: str, tensor: Tensor) -> bool:
    """Which tensors musubi-tuner quantizes in a Wan."""
    return (
        key.startswith("blocks.")
        and key.endswith(".weight")
        and "norm" not in key
        and "modulation" not in key
        and tensor.ndim == 2
    )


def wan_shapes() -> dict[str, tuple[int, ...]]:
    """Key to shape of a Wan whose second MLP layer has 416 inputs."""
    import comfy.ldm.wan.model
    import comfy.ops

    model = comfy.ldm.wan.model.WanModel(
        dim=256,
        ffn_dim=416,
        num_heads=2,
        num_layers=2,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.manual_cast,
    )
    return {key: tuple(t.shape) for key, t in model.state_dict().items()}


def make_lora(
    dense: Mapping[str, Tensor], encoded: Mapping[str, Tensor], size: float
) -> dict[str, Tensor]:
    """A LoRA on every quantized layer."""
    generator, lora = torch.Generator().manual_seed(3), {}
    for key in (key for key in encoded if encoded[key].dtype == torch.float8_e4m3fn):
        layer, weight = key.removesuffix(".weight"), dense[key].float()
        down = torch.randn(4, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], 4, generator=generator)
        up *= size * weight.norm() / (up @ down).norm()
        lora[f"diffusion_model.{layer}.lora_A.weight"] = down
        lora[f"diffusion_model.{layer}.lora_B.weight"] = up
    return lora


def with_lora(model: Any, lora: Mapping[str, Tensor]) -> Any:
    """A clone with the LoRA, as the LoRA loader node makes it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)[0]


def sample(model: Any) -> Tensor:
    """The latent after two steps of the stock sampler."""
    import comfy.sample

    context = context_of(model)
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 16, 8, 8))
    noise = comfy.sample.prepare_noise(latent, 1)
    positive, negative = [[context, {}]], [[context.flip(1), {}]]
    prompts = (positive, negative, latent)
    arguments = (model, noise, 2, 2.0, "euler", "simple", *prompts)
    result: Tensor = comfy.sample.sample(*arguments, disable_pbar=True, seed=1)
    return result


def first_output(model: Any, half: bool = False) -> Tensor:
    """The network's first output, with half of the weights offloaded or none."""
    import comfy.model_management

    if half:
        comfy.model_management.unload_all_models()
        model.partially_load(torch.device("cpu"), model.model_size() // 2)
    else:
        comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 1, 8, 8, generator=generator)
    context = context_of(model)
    output: Tensor = model.model.apply_model(
        x, torch.tensor([0.7]), c_crossattn=context
    )
    return output


def context_of(model: Any) -> Tensor:
    """Conditioning of the width that a model takes."""
    wan = type(model.model).__name__.startswith("WAN")
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 7, 4096 if wan else 192, generator=generator)


def state(model: Any) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    weights = model.model.diffusion_model.state_dict()
    return {key: tensor.clone().contiguous() for key, tensor in weights.items()}


def same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def figure(value: float) -> str:
    """An error with as many digits as matter."""
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-4 else f"{value:.4f}"


def outcome(step: Callable[[], str]) -> str:
    """What a step gives, or why it fails."""
    import comfy.model_management

    try:
        return step()
    except Exception as failure:
        first = next((line for line in f"{failure}".splitlines() if line.strip()), "")
        if first.rstrip().endswith(":") and len(f"{failure}".splitlines()) > 1:
            first = f"{first.strip()} {f'{failure}'.splitlines()[1].strip()}"
        return f"fails: {type(failure).__name__}: {first.strip()}"
    finally:
        comfy.model_management.unload_all_models()


def import_pack(folder: Path) -> Any:
    """A node pack, imported by its folder as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(
        "peer_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(
            f"{COMFYUI_MUSUBI}: {folder} is no node pack; set it to a checkout"
        )
    module = sys.modules["peer_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(side: str, root: str) -> None:
    """Print what came of every step, as JSON."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "comfyui"))
    import launch

    launch.prepare(root)
    import comfy.supported_models

    small = {"num_attention_heads": 2, "joint_attention_dim": 192}
    comfy.supported_models.QwenImage.unet_extra_config = small
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        found = Case(side, Path(folder)).run()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
