"""hijack beside other node packs that load quantized models, on real servers.

The packs are found through ``HIJACK_TEST_PEERS``, paths joined by ``:``, or in
``~/peers``: ComfyUI-GGUF, ComfyUI-WanVideoWrapper and ComfyUI-musubi, and a folder
``site-packages`` with what they need beyond ComfyUI's own dependencies (filled by
``pip install --no-deps --target``). ``HIJACK_TEST_NEIGHBOURS=each`` starts servers for
each order of imports, and for each pack alone with hijack. Every server with hijack
also has a pack that wraps the function hijack patches, and that shows hijack's report
in a node's inputs.
"""

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import comfy_harness
import comfy_models
import pytest
import torch
from comfy_harness import PromptError, relative_error
from safetensors.torch import load_file, save_file

#: One release of each kind of carrier.
DEFAULT = ("0.8.0", "0.33.0")
#: Pack to the modules it needs and ComfyUI does not, and a node by which it is known.
PACKS = {
    "ComfyUI-GGUF": (("gguf",), "UnetLoaderGGUF"),
    "ComfyUI-WanVideoWrapper": (
        ("diffusers", "accelerate", "ftfy", "easydict"),
        "WanVideoModelLoader",
    ),
    "ComfyUI-musubi": ((), "MusubiUNETLoader"),
}
ORDERS = ("hijack first", "hijack last")
#: Rounding of two ways to compute the same in float32.
ROUNDING = 1e-5


# -- what there is ---------------------------------------------------------------------


def _peers():
    """Name to path of everything that was put there for these tests."""
    named = os.environ.get("HIJACK_TEST_PEERS")
    if named is None:
        paths = sorted(Path("~/peers").expanduser().glob("*"))
    else:
        paths = [Path(part) for part in named.split(os.pathsep) if part]
    return {path.name: path for path in paths}


def _why_not():
    """Why the tests cannot run here, or None."""
    missing = [name for name in PACKS if name not in PEERS]
    if missing:
        return f"no {', '.join(missing)}: clone to ~/peers or set HIJACK_TEST_PEERS"
    needed = [module for modules, _ in PACKS.values() for module in modules]
    absent = [module for module in needed if not (SITE / module).exists()]
    if absent:
        target = f"pip install --no-deps --target {SITE}"
        return f"packs need modules: {target} {' '.join(absent)}"
    return None if RELEASES else "no ComfyUI: set HIJACK_TEST_COMFYUI"


def _releases():
    """The releases to start: some of those there are, or all that are named."""
    found = comfy_harness.releases()
    if os.environ.get("HIJACK_TEST_COMFYUI") is None:
        return {v: path for v, path in found.items() if v in DEFAULT}
    return found


PEERS = _peers()
SITE = PEERS.get("site-packages", Path("~/peers/site-packages").expanduser())
RELEASES = _releases()
WHY_NOT = _why_not()
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}"),
]


# -- files and servers -----------------------------------------------------------------

WRITE_GGUF = """
import sys, gguf, torch
from safetensors.torch import load_file
_, source, target = sys.argv
writer = gguf.GGUFWriter(target, "qwen_image")
for key, tensor in load_file(source).items():
    array = tensor.float().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else None
    kind = kind or gguf.GGMLQuantizationType.F32
    writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""

#: A pack that wraps the function hijack patches, and shows what hijack says of that.
WRAPS = """
import functools
import comfy.model_detection

def wrap(original):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return original(*args, **kwargs)
    return wrapper

class Report:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        from hijack import status
        return {"required": {"report": ([str(status()["comfyui"])],)}}

comfy.model_detection.model_config_from_unet = wrap(
    comfy.model_detection.model_config_from_unet
)
NODE_CLASS_MAPPINGS = {"HijackReport": Report}
"""


def _write_wraps(target):
    target.mkdir()
    (target / "__init__.py").write_text(WRAPS)


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """A folder with files for every loader.

    ComfyUI-musubi reads blocks of one size from files with ``musubi`` in the name.
    """
    folder = tmp_path_factory.mktemp("neighbours")
    for name in ("bf16", "fp8", "exact"):
        (folder / f"{name}.safetensors").symlink_to(models / f"{name}.safetensors")
    dense = load_file(models / "bf16.safetensors")
    quantized_sd = dict(dense)
    for key, tensor in dense.items():
        if comfy_models.is_quantized(key, tensor):
            scale = key.replace(".weight", ".scale_weight")
            quantized_sd[key], quantized_sd[scale], _ = comfy_models.quantize(
                tensor, "block"
            )
    save_file(quantized_sd, folder / "musubi.safetensors")
    command = [sys.executable, "-c", WRITE_GGUF]
    paths = [str(models / "bf16.safetensors"), str(folder / "q8.gguf")]
    environment = {**os.environ, "PYTHONPATH": str(SITE)}
    subprocess.run([*command, *paths], env=environment, check=True)
    return folder


@pytest.fixture(scope="module")
def without(files, tmp_path_factory):
    """A function that gives what a release's packs have and give without hijack."""

    @functools.cache
    def found(version):
        folder = tmp_path_factory.mktemp("without")
        with _server(version, files, folder, tuple(PACKS), None) as server:
            return _found(server, tuple(PACKS))

    return found


def _cases():
    """Release, packs and order of every server with hijack."""
    each = os.environ.get("HIJACK_TEST_NEIGHBOURS") == "each"
    names = [tuple(PACKS), *((name,) for name in PACKS)] if each else [tuple(PACKS)]
    cases = []
    for place, version in enumerate(RELEASES):
        orders = ORDERS if each else [ORDERS[place % 2]]
        cases += itertools.product([version], names, orders)
    return cases or [("no release", (), "")]


@pytest.fixture(
    scope="module",
    params=_cases(),
    ids=[f"{v}, {order}, {'+'.join(names)}" for v, names, order in _cases()],
)
def case(request):
    """A server with hijack: its release, the packs and the order."""
    return request.param


@pytest.fixture(scope="module")
def alone(case, without):
    """What the packs have and give without hijack."""
    return without(case[0])


@pytest.fixture(scope="module")
def together(case, files, tmp_path_factory):
    """What they have and give with hijack, and hijack with them."""
    version, names, order = case
    folder = tmp_path_factory.mktemp("together")
    with _server(version, files, folder, names, order) as server:
        return {**_found(server, names), "order": order}


def _server(version, files, folder, names, order):
    """A server whose packs are imported in an order, with hijack somewhere or not."""
    packs = {name: PEERS[name] for name in names}
    if order is not None:
        packs |= {"wraps": _write_wraps, "hijack": comfy_harness.clone_repository}
    packs = {f"{place}-{name}": packs[name] for place, name in enumerate(packs)}
    server = comfy_harness.Server(
        RELEASES[version], folder, files, packs, {"PYTHONPATH": str(SITE)}
    )
    if order is not None:
        _arrange(folder / "custom_nodes", first=order == "hijack first")
    return server


def _arrange(nodes, first):
    """Rename packs until the file system lists hijack first, or last.

    ComfyUI imports packs as they are listed: on some systems by name or by a hash of
    it, on others by time. So they get new names in both orders.
    """
    for turn in range(1000):
        listed = [name for name in os.listdir(nodes) if "-" in name]
        ours = [name.endswith("-hijack") for name in listed]
        if ours.index(True) == (0 if first else len(listed) - 1):
            return
        for name in sorted(listed, key=lambda n: n.endswith("-hijack") != turn % 2):
            (nodes / name).rename(nodes / f"{turn}-{name.partition('-')[2]}")
    raise AssertionError(f"no names give that order: {listed}")


def _found(server, names):
    """Everything the tests ask of one server."""
    info = server._get("/object_info")
    packs = {
        name: {
            node: {**entry, "python_module": None}
            for node, entry in info.items()
            if entry["python_module"].endswith(f"-{name}")
        }
        for name in names
    }
    given = {name: _outcome(server, _stock(name)) for name in ("bf16", "exact", "fp8")}
    given.update(
        (name, _outcome(server, loader))
        for name, (pack, loader) in LOADERS.items()
        if pack in names
    )
    report = info.get("HijackReport", {}).get("input", {}).get("required", {})
    return {
        "nodes": packs,
        "given": given,
        "report": report.get("report"),
        "log": server.log(),
    }


def _stock(name):
    inputs = {"unet_name": f"{name}.safetensors", "weight_dtype": "default"}
    return {"class_type": "UNETLoader", "inputs": inputs}


def _musubi(kind, **inputs):
    inputs = {"unet_name": "musubi.safetensors", "weight_dtype": "fp8_e4m3fn"} | inputs
    return "ComfyUI-musubi", {"class_type": kind, "inputs": {"block_size": 64} | inputs}


#: Everything that the packs load, and the pack.
LOADERS = {
    "gguf": (
        "ComfyUI-GGUF",
        {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "q8.gguf"}},
    ),
    "musubi": _musubi("MusubiUNETLoader"),
    "musubi just in time": _musubi(
        "MusubiUNETJitLoader", unet_name="bf16.safetensors", lora_name="none"
    ),
}


def _outcome(server, loader):
    """The latent with a loader node, or the error that it gives."""
    asked = comfy_harness.workflow("any") | {"unet": loader}
    asked["save"]["inputs"]["filename_prefix"] = f"test/{next(server.numbers)}"
    try:
        saved = server.run(asked)["outputs"]["save"]["latents"][0]
    except PromptError as error:
        return f"{error}"
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    return load_file(path)["latent_tensor"]


def _same(a, b):
    return torch.is_tensor(a) and torch.is_tensor(b) and torch.equal(a, b)


# -- tests -----------------------------------------------------------------------------


def test_the_packs_work_without_hijack(alone):
    """Every pack is imported and loads its file: else the rest would prove nothing."""
    for name, (_, node) in PACKS.items():
        assert node in alone["nodes"][name], f"{name}:\n{alone['log'][-3000:]}"
    failed = {k: v for k, v in alone["given"].items() if not torch.is_tensor(v)}
    assert failed.keys() <= {"fp8"}, failed
    exact = alone["given"]["exact"]
    for name in LOADERS:
        assert relative_error(alone["given"][name], exact) < 0.1, name


def test_the_server_starts_and_every_node_is_there(alone, together):
    """Each pack has the nodes, inputs and outputs that it has without hijack."""
    for name, nodes in together["nodes"].items():
        assert nodes == alone["nodes"][name]
    assert "(IMPORT FAILED):" not in together["log"]  # so it says it of a pack
    assert not re.search(r"hijack: .*not (loaded|patched)", together["log"])


def test_who_else_patched_is_named(together):
    """The report names the pack that wrapped our function, its file, and when."""
    [(report, *_)] = together["report"]
    when = "before" if together["order"] == "hijack last" else "after"
    function = "comfy.model_detection.model_config_from_unet"
    words = (
        rf"{function}: patched {when} us by \S+-wraps\.\S+ \(\S+-wraps/__init__.py\)"
    )
    assert re.search(words, report), report
    # whoever comes later is not there yet when ComfyUI's log says who was
    assert bool(re.search(words, together["log"])) == (when == "before")


def test_the_stock_loader_is_exact_beside_them(alone, together):
    """Block FP8 gives the latent of the exact weights, ordinary files the same bits."""
    given = together["given"]
    assert relative_error(given["fp8"], alone["given"]["exact"]) < ROUNDING
    assert _same(given["bf16"], alone["given"]["bf16"])
    assert _same(given["exact"], alone["given"]["exact"])


@pytest.mark.parametrize("name", LOADERS)
def test_their_own_loaders_give_the_same_bits(alone, together, name):
    """What another pack loads with its own operations is none of hijack's business."""
    if name not in together["given"]:
        pytest.skip("that pack is not on this server")
    assert _same(together["given"][name], alone["given"][name]), together["given"][name]
