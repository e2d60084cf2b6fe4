"""What a bug report needs, for ``hijack doctor`` and for the nodes of hosts alike."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hijack import kernels
from hijack.errors import printable
from hijack.hosts.manager import HostStatus, loaded_layers, status
from hijack.quantized import QuantizationConfig, WeightView
from hijack.registry import Registry, current_registry
from hijack.scheme import Scheme
from hijack.text import did_you_mean

#: Packages that formats and hosts depend on, whether they are installed or not.
PACKAGES = (
    "torch",
    "safetensors",
    "pluggy",
    "wrapt",
    "comfy-kitchen",
    "llvmlite",
    "triton",
    "accelerate",
    "diffusers",
    "peft",
    "transformers",
)
#: Variables that hijack reads; others that begin like them are shown too.
VARIABLES = (
    "HIJACK_DISABLE",
    "HIJACK_FORWARD",
    "HIJACK_LORA",
    "HIJACK_PREFER",
    "HIJACK_QUANTIZED_INPUTS",
    "HIJACK_STRICT",
)
_PREFIX = "HIJACK_"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The state of hijack in this process.

    Attributes:
        hijack: its version.
        folder: where the package is.
        python: its version.
        system: the operating system.
        packages: name of a package to its version, or a word where it has none.
        devices: what torch can compute on, one sentence each.
        threads: that torch computes with on the CPU.
        variables: every ``HIJACK_*`` variable to its value; None if it is not set.
        schemes: name of each scheme to where it came from.
        kernels: scheme to what would compute a Linear on each device, a sentence each.
        kernel_names: what ``HIJACK_FORWARD`` may name.
        plugins: name of each plugin to its distribution and version.
        hosts: where hijack stands with each host.
        layers: host to its quantized layers in memory, one sentence for each model.
        slow_imports: plugin to the seconds it took to import.
        problems: what plugins did wrong.
    """

    hijack: str
    folder: str
    python: str
    system: str
    packages: Mapping[str, str]
    devices: tuple[str, ...]
    threads: int
    variables: Mapping[str, str | None]
    schemes: Mapping[str, str]
    kernels: Mapping[str, tuple[str, ...]]
    kernel_names: tuple[str, ...]
    plugins: Mapping[str, str]
    hosts: Mapping[str, HostStatus]
    layers: Mapping[str, tuple[str, ...]]
    slow_imports: Mapping[str, float]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"hijack {self.hijack} in {self.folder}"]
        lines += [f"python {self.python} on {self.system}"]
        lines += [f"{name} {version}" for name, version in self.packages.items()]
        lines += [f"device: {device}" for device in self.devices]
        lines += [f"threads: {self.threads}"]
        lines += [f"{name}={value or ''}" for name, value in self.variables.items()]
        for what, found in (("schemes", self.schemes), ("plugins", self.plugins)):
            each = [f"{n} ({source})" if source else n for n, source in found.items()]
            lines.append(f"{what}: {', '.join(each) or 'none'}")
        lines.append(f"kernels: {', '.join(self.kernel_names)}")
        for name, sentences in self.kernels.items():
            lines += [f"{name} on {sentence}" for sentence in sentences]
        for name, host in self.hosts.items():
            lines += str(host).splitlines()
            if host.patched:
                lines.append(f"  patches: {', '.join(host.patches)}")
            lines += [f"  {sentence}" for sentence in self.layers.get(name, ())]
        lines += [
            f"plugin {plugin}: took {seconds:.1f} s to import"
            for plugin, seconds in self.slow_imports.items()
        ]
        ending = self.problems or ("no problems found",)
        return "\n".join(map(printable, [*lines, *ending]))


def diagnose(registry: Registry | None = None) -> Diagnosis:
    """Gather what a bug report needs.

    Args:
        registry: whose plugins are looked at; None for the one in force.
    """
    registry = current_registry(registry)
    schemes = registry.schemes()  # first, for it loads the plugins
    package: Any = sys.modules["hijack"]
    return Diagnosis(
        package.__version__,
        str(Path(package.__file__).parent),
        platform.python_version(),
        platform.platform(),
        {name: _version(name) for name in PACKAGES},
        tuple(_devices()),
        torch.get_num_threads(),
        _variables(),
        {name: schemes[name].origin for name in sorted(schemes)},
        {name: _kernels(schemes[name]) for name in sorted(schemes)},
        tuple(sorted(kernels.kernel_names(schemes.values()))),
        registry.plugins(),
        status(),
        loaded_layers(),
        dict(registry.slow_imports),
        (*map(str, registry.problems), *_misspelled(schemes.values())),
    )


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__  # with the build, such as +cu128
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed, or without metadata"


def _variables() -> dict[str, str | None]:
    others = (name for name in os.environ if name.startswith(_PREFIX))
    return {name: os.environ.get(name) for name in sorted({*VARIABLES, *others})}


def _kernels(scheme: Scheme) -> tuple[str, ...]:
    """What would compute a Linear of an ordinary size, on the CPU and on a GPU."""
    layer = nn.Linear(256, 128, device="meta")
    config = QuantizationConfig.of(scheme)
    sentences = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            qdata, params = scheme.quantize(torch.ones(128, 256))
            tensors = {name: tensor.to(device) for name, tensor in params.items()}
            weight = WeightView(
                *(qdata.to(device), tensors, config, (128, 256), torch.bfloat16)
            )
            what = kernels.describe_rows(weight, scheme.bind_forward(layer))
        except Exception as error:  # a scheme of somebody else's
            what = f"{type(error).__name__}: {error}"
        sentences.append(f"{device}: kernel {what}")
    return tuple(sentences)


def _misspelled(schemes: Iterable[Scheme]) -> list[str]:
    known = list(schemes)
    names = [scheme.name for scheme in known]
    # what is disabled is no scheme any more, so only what looks like another is told
    disabled = _words("HIJACK_DISABLE") - {"*", *status(), *names}
    hints = {name: did_you_mean(name, [*status(), *names]) for name in disabled}
    inputs = _words(kernels.INPUTS_VARIABLE) - {"0", "1", *names}
    return [
        *(
            f"HIJACK_DISABLE: got {name!r}, expected hosts and schemes{hint}"
            for name, hint in sorted(hints.items())
            if hint
        ),
        *kernels.misspelled(kernels.kernel_names(known)),
        *(
            f"{kernels.INPUTS_VARIABLE}: got {name!r}, expected 0, 1 or names of "
            f"schemes{did_you_mean(name, names)}"
            for name in sorted(inputs)
        ),
    ]


def _words(variable: str) -> set[str]:
    """What a comma list names."""
    return {name.strip() for name in os.environ.get(variable, "").split(",")} - {""}


def _devices() -> list[str]:
    """The CPU and what else torch computes on."""
    cores = os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    found = [f"cpu, {platform.machine()}, {cores} cores, {capability}"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}, {facts.name}, {facts.total_memory / 1e9:.1f} GB, "
            f"{facts.major}.{facts.minor}"
        )
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.xpu.is_available():
        found += [
            f"xpu:{index}, {torch.xpu.get_device_name(index)}"
            for index in range(torch.xpu.device_count())
        ]
    return found
