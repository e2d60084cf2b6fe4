"""The example plugins pass the conformance kit, and work once they are installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hijack_int8_rowwise import Int8Rowwise
from torch import nn

import hijack
from hijack.testing import SchemeConformance

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
#: Folder of an example, to its scheme and what must be installed besides.
PLUGINS = {
    "hijack-int8-rowwise": ("int8_rowwise", "torch"),
    "hijack-kitchen-int8": ("kitchen_int8", "comfy_kitchen"),
}

ASK = """
import json, sys, torch, hijack
name = sys.argv[1]
scheme = hijack.schemes()[name]
layer = hijack.wrap_module(torch.nn.Linear(8, 4), name)
print(json.dumps([scheme.origin, str(layer.weight.qdata.dtype)]))
"""


class TestInt8Rowwise(SchemeConformance):
    """The example against the whole kit."""

    min_sqnr_db = 30.0
    block_size = (1, -1)

    @pytest.fixture
    def scheme(self):
        """The example's scheme."""
        return Int8Rowwise()


class TestKitchenInt8(SchemeConformance):
    """The wrapper of comfy-kitchen's class against the whole kit."""

    min_sqnr_db = 30.0
    min_forward_db = 30.0
    block_size = (1, -1)

    @pytest.fixture
    def scheme(self):
        """The example's scheme."""
        return kitchen().KitchenInt8()


def kitchen():
    """The module of the example that needs comfy-kitchen."""
    pytest.importorskip("comfy_kitchen")
    import hijack_kitchen_int8

    return hijack_kitchen_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_class_decodes_and_multiplies(dtype):
    """Weight and product in integers are comfy-kitchen's; gradients the weight's."""
    module = kitchen()
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 32, dtype=dtype), torch.randn(5, 96, dtype=dtype)
    tensor = module.QuantizedTensor.from_float(
        layer.weight.detach().float(), module.LAYOUT, per_channel=True
    ).to(dtype)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, tensor, layer.bias)
    layer.requires_grad_(False)
    hijack.wrap_module(layer, module.KitchenInt8())
    assert torch.equal(layer.weight.dense(), tensor.dequantize())
    assert torch.equal(layer(x), expected)
    dense = torch.nn.functional.linear(x, tensor.dequantize(), layer.bias)
    assert not torch.equal(expected, dense)  # its input is quantized
    x.requires_grad_()
    torch.testing.assert_close(layer(x), dense)
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], tensor.dequantize().sum(0), rtol=1e-2, atol=1e-2)


def test_the_class_reads_what_the_scheme_of_hijack_writes(tmp_path):
    """The same codes and scales in another spelling of the same format."""
    module = kitchen()
    import schemes.int8

    weight = torch.randn(32, 96)
    codes, params = module.KitchenInt8().quantize(weight)
    own, own_params = schemes.int8.Int8().quantize(weight)
    assert torch.equal(codes, own)
    assert torch.equal(
        params["weight_scale"].flatten(), own_params["weight_scale"].flatten()
    )


@pytest.fixture(scope="module", params=PLUGINS)
def plugin(request, tmp_path_factory):
    """Name of a scheme, and a folder its example is installed in, as pip does it."""
    example = EXAMPLES / request.param
    name, needed = PLUGINS[request.param]
    pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("example")
    source, target = folder / "source", folder / "target"
    shutil.copytree(example, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *options, "--target", target, source], check=True)
    return name, target


def python(installed, *arguments):
    """Run Python with the example installed; its output, without a complaint."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=installed,
    )
    assert done.stderr == ""
    return done.stdout


def test_installed_plugin_is_found(plugin):
    """An installed plugin is there without an import, and says where it is from."""
    name, installed = plugin
    origin, dtype = json.loads(python(installed, "-c", ASK, name))
    assert origin.startswith(f"entry point {name} = hijack_{name}:")
    assert dtype == "torch.int8"


def test_command_line_lists_the_plugin(plugin):
    """``hijack schemes`` shows the plugin and its origin."""
    name, installed = plugin
    run = "import sys; from hijack.cli import main; sys.exit(main(['schemes']))"
    listed = python(installed, "-c", run)
    line = next(line for line in listed.splitlines() if line.startswith(name))
    assert f"hijack_{name}" in line


def test_plugin_can_be_disabled(plugin, monkeypatch):
    """``HIJACK_DISABLE`` keeps a plugin from being loaded."""
    name, installed = plugin
    monkeypatch.setenv("HIJACK_DISABLE", name)
    out = python(installed, "-c", f"import hijack; print('{name}' in hijack.schemes())")
    assert out.strip() == "False"


@pytest.mark.parametrize(
    ("folder", "most"), [("hijack-int8-rowwise", 35), ("hijack-kitchen-int8", 50)]
)
def test_examples_are_small(folder, most):
    """Two files, about 30 lines; 45 with a forward."""
    files = [f for f in (EXAMPLES / folder).iterdir() if f.suffix in (".py", ".toml")]
    lines = [line for f in files for line in f.read_text().splitlines() if line.strip()]
    assert len(files) == 2
    assert len(lines) <= most
