"""Each test that asks for a release runs once for every ComfyUI there is."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

import comfy_harness  # noqa: E402 - found through the path set above
import comfy_models  # noqa: E402 - likewise

RELEASES = comfy_harness.releases()
WHY_NOT = (
    "no ComfyUI found: set HIJACK_TEST_COMFYUI or put one at ~/comfy/ComfyUI-VERSION"
)


def pytest_generate_tests(metafunc):
    """Run tests of a release for each one, or skip them once with the reason."""
    if "release" in metafunc.fixturenames:
        missing = pytest.param(None, marks=pytest.mark.skip(reason=WHY_NOT))
        values = list(RELEASES) or [missing]
        metafunc.parametrize("release", values, scope="module", indirect=True)


def pytest_collection_modifyitems(items):
    """Mark everything here, so that ``-m 'not comfyui'`` leaves it out."""
    for item in items:
        if HERE in str(item.path):
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="module")
def release(request):
    """The version under test."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("ComfyUI's dependencies are missing: see scripts/test")
    return request.param


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with every file of `comfy_models.FILES`, one in int8 for a plugin."""
    folder = tmp_path_factory.mktemp("models")
    newest = RELEASES[list(RELEASES)[-1]]
    script = Path(comfy_models.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(newest), str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, release):
    """A folder for servers of one release."""
    return tmp_path_factory.mktemp(f"comfyui-{release}")


@pytest.fixture(scope="module")
def stock(release, base, models):
    """A server without hijack, and the latents it gives."""
    folder = RELEASES[release]
    with comfy_harness.Server(folder, base / "stock", models) as server:
        yield server


@pytest.fixture(scope="module")
def expected(stock):
    """The stock server's latents, by file."""
    names = ("bf16", "exact", "exact-int8")
    return {name: stock.latent(name) for name in names}


@pytest.fixture(scope="module")
def hijacked(release, base, models, expected):
    """A server with this repository and a scheme plugin in its custom_nodes."""
    packs = {"a_plugin": write_plugin_pack, "hijack": comfy_harness.clone_repository}
    folder = RELEASES[release]
    with comfy_harness.Server(folder, base / "hijacked", models, packs) as server:
        yield server


def write_plugin_pack(target):
    """A node pack, first by name, that registers the example plugin's scheme."""
    example = comfy_harness.REPOSITORY / "examples" / "hijack-int8-rowwise"
    module = (example / "hijack_int8_rowwise.py").read_text()
    target.mkdir()
    (target / "__init__.py").write_text(
        f"{module}\n\nhijack.register(Int8Rowwise())\nNODE_CLASS_MAPPINGS = {{}}\n"
    )
