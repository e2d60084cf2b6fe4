"""The wheel: what it installs, and what it says about itself."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hijack

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INFO = "comfyui_hijack-0.1.0.dist-info"

#: Modules that importing hijack must not import: hosts, extras, and what tests use.
FOREIGN = ("comfy", "comfy_kitchen", "tqdm", "matplotlib", "pytest", "hypothesis")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    # no dot folders: virtual environments and caches are among them
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *options, "-w", folder, folder / "tree"], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_installs_two_packages(wheel):
    """Exactly hijack and schemes, whatever else is in the tree."""
    assert {n.split("/")[0] for n in wheel.namelist()} == {"hijack", "schemes", INFO}


def test_wheel_has_every_module(wheel):
    """No module and no script is left out, and both packages are typed."""
    packed = {name for name in wheel.namelist() if not name.startswith(INFO)}
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("hijack", "schemes")
        for pattern in ("*.py", "*.js")
        for path in (ROOT / package).rglob(pattern)
    }
    assert packed == modules | {"hijack/py.typed", "schemes/py.typed"}


def test_wheel_metadata(wheel):
    """The core asks for four distributions, and the licence comes along."""
    metadata = email.message_from_bytes(wheel.read(f"{INFO}/METADATA"))
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    names = {re.split(r"[<>=!~ ]", requirement)[0] for requirement in needed}
    assert names == {"torch", "safetensors", "pluggy", "wrapt"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{INFO}/licenses/LICENSE" in wheel.namelist()


def test_wheel_entry_points(wheel):
    """The command and the reference scheme are declared."""
    text = wheel.read(f"{INFO}/entry_points.txt").decode()
    assert "hijack = hijack.cli:main" in text
    assert "blockwise_fp8 = schemes.blockwise_fp8" in text


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The folder above a clone whose folder is called hijack."""
    folder = tmp_path_factory.mktemp("above")
    names = ("hijack", "schemes", "__init__.py", "prestartup_script.py")
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / "hijack").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "hijack" / name)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        [
            "-c",
            "import hijack, sys; hijack.load; import schemes.blockwise_fp8 as s; "
            "print(hijack.__file__, hijack.loading.__file__, s.__file__)",
        ],
        ["-c", "from hijack import cli; cli.main(['doctor'])"],
        ["-m", "hijack", "doctor"],
    ],
)
def test_a_clone_called_hijack_is_the_package(clone, words):
    """From the folder above it, where its node pack looks like the package."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environ = {k: v for k, v in environ.items() if not k.startswith("HIJACK_")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=clone,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.count(str(clone / "hijack")) in (1, 3)
    assert str(ROOT) not in done.stdout


def test_import_stays_light():
    """Importing hijack and its scheme imports no host, no extra and no test tool."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"  # torch brings tqdm along
        "import hijack, schemes.blockwise_fp8\n"
        f"print([m for m in {FOREIGN!r} if m in set(sys.modules) - before])"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_version_is_the_same_everywhere():
    """Registries read it in pyproject.toml, programs in the package."""
    assert hijack.__version__ == PROJECT["project"]["version"]


def test_changelog_has_this_version():
    """The newest entry of the changelog is the version being built."""
    versions = re.findall(
        r"^## \[?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert versions[0] == PROJECT["project"]["version"]


def test_comfy_metadata():
    """ComfyUI's registry needs a publisher and a name; versions are the tested ones."""
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    from hijack.hosts import comfyui

    assert comfy["requires-comfyui"] == f">={comfyui.SUPPORTED[0]}"


def test_requirements_are_a_part_of_the_dependencies():
    """requirements.txt asks for what ComfyUI lacks, no more than the package does."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    asked = {line.strip() for line in lines if line.strip() and line[0] != "#"}
    assert asked
    assert asked <= set(PROJECT["project"]["dependencies"])


def test_the_registry_is_told_everything():
    """Addresses, an icon that is there, a licence and the systems it runs on."""
    urls, comfy = PROJECT["project"]["urls"], PROJECT["tool"]["comfy"]
    repository = urls["Repository"]
    assert {"Homepage", "Documentation", "Repository", "Issues"} <= set(urls)
    assert all(url.startswith(repository) for url in urls.values())
    assert (ROOT / urls["Documentation"].partition("/tree/main/")[2]).is_dir()
    assert (ROOT / urls["Changelog"].partition("/blob/main/")[2]).is_file()
    raw = repository.replace("//github.com", "//raw.githubusercontent.com")
    icon = (ROOT / comfy["Icon"].removeprefix(f"{raw}/main/")).read_text()
    size = re.search(r'width="(\d+)" height="(\d+)"', icon)
    assert size[1] == size[2] == "400"  # the most that is allowed, and square
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Operating System :: OS Independent" in PROJECT["project"]["classifiers"]


def test_the_registry_gets_what_a_pack_needs():
    """Of what git has, the tests, the documents and what only developers use is out."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    lines = (ROOT / ".comfyignore").read_text().splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    for pattern in ignored:  # folders and files, and no other patterns
        assert any(f == pattern or f.startswith(pattern) for f in listed), pattern
    kept = {f for f in listed if not f.startswith(tuple(ignored))}
    tops = {file.partition("/")[0] for file in kept}
    assert tops == {
        ".comfyignore",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "__init__.py",
        "example_workflows",
        "hijack",
        "prestartup_script.py",
        "pyproject.toml",
        "requirements.txt",
        "schemes",
    }
    assert "hijack/hosts/comfyui/nodes/web/hijack.js" in kept


@pytest.mark.parametrize(
    "imports",
    [
        "hijack",
        "schemes.blockwise_fp8, hijack",
        "torch, hijack",
        "hijack, torch",
        "hijack.registry",
        "hijack.hosts.checkpoint",
    ],
)
def test_importing_hijack_is_what_waits_for_hosts(imports):
    """One import is enough, whether torch was there before or comes with it."""
    code = f"import {imports}; print(*hijack.hosts.status().values(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert not done.stderr
    assert "comfyui: not patched (waiting for comfy.sd to be imported)" in done.stdout
