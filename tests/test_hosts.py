"""Hosts are patched when they are imported, and restored without a trace."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

import hijack
import hijack.hosts
from hijack.errors import PatchError
from hijack.hosts import manager
from hijack.hosts.adapter import Probe, version_key
from hijack.hosts.adapter import tested as is_tested
from hijack.hosts.diagnostics import diagnose
from hijack.patching import Patch

NUMBER = itertools.count()

DETECT = """
def detect(state_dict, prefix):
    return (prefix, sorted(state_dict))
"""


class Toy:
    """An adapter of a host that a test writes to disk."""

    SUPPORTED = ("1.0", "2.5")

    def __init__(self, name):
        self.NAME = name
        self.MODULE = f"{name}.detect"
        self.PROBES = (Probe(f"{name}.detect.detect", ("state_dict", "prefix")),)
        self.alive = 0

    @property
    def module(self):
        return sys.modules[self.MODULE]

    def get_version(self):
        return sys.modules[self.NAME].__version__

    def patches(self):
        def make(original):
            def detect(*args, **kwargs):
                return ("patched", original(*args, **kwargs))

            return detect

        return [Patch(self.module, "detect", make)]

    def live(self):
        return self.alive


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy host on disk, known to hijack, not imported."""
    name = f"toyhost{next(NUMBER)}"
    write(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(manager, "_CONTROLS", dict(manager._controls()))
    for variable in ("HIJACK_DISABLE", "HIJACK_STRICT"):
        monkeypatch.delenv(variable, raising=False)
    adapter = Toy(name)
    adapter.folder = tmp_path / name
    hijack.hosts.add_host(adapter)
    yield adapter
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def write(folder, name, detect=DETECT, version="2.0"):
    package = folder / name
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (package / "detect.py").write_text(textwrap.dedent(detect))


def load(toy):
    return importlib.import_module(toy.MODULE)


def test_a_host_that_is_imported_is_patched_at_once(toy):
    """patch() of an imported host replaces the function and says so."""
    host = load(toy)
    status = hijack.hosts.patch(toy.NAME)
    assert status.patched
    assert status.version == "2.0"
    assert str(status) == f"{toy.NAME} 2.0: patched"
    assert host.detect({}, "a") == ("patched", ("a", []))


def test_a_host_is_patched_when_it_is_imported(toy):
    """arm() before the import never imports the host, and patches it once it is."""
    status = hijack.hosts.arm(toy.NAME)
    assert not status.patched
    assert "waiting for" in status.reason
    assert toy.NAME not in sys.modules
    assert load(toy).detect({}, "a")[0] == "patched"
    assert hijack.hosts.status()[toy.NAME].patched


def test_unpatch_restores_the_very_function(toy):
    """unpatch() puts back the same object, and can be repeated."""
    original = load(toy).detect
    hijack.hosts.patch(toy.NAME)
    hijack.hosts.patch(toy.NAME)
    assert not hijack.hosts.unpatch(toy.NAME).patched
    assert load(toy).detect is original
    hijack.hosts.unpatch(toy.NAME)


def test_unpatch_before_the_import_disarms(toy):
    """A host that was unpatched before its import is not patched by it."""
    hijack.hosts.patch(toy.NAME)
    hijack.hosts.unpatch(toy.NAME)
    load(toy)
    status = hijack.hosts.status()[toy.NAME]
    assert not status.patched
    assert status.reason == "unpatched"


def test_a_half_imported_host_is_patched_when_it_is_ready(toy):
    """Armed in the middle of the host's own import, hijack waits for its end."""
    write(
        toy.folder.parent,
        toy.NAME,
        f"""
        import hijack.hosts
        status = hijack.hosts.arm({toy.NAME!r})

        def detect(state_dict, prefix):
            return prefix
        """,
    )
    host = load(toy)
    assert not host.status.patched
    assert "waiting until" in host.status.reason
    assert host.detect({}, "a") == ("patched", "a")
    assert hijack.hosts.status()[toy.NAME].patched


def test_arming_twice_in_the_middle_of_an_import_patches_once(toy):
    """However often a host is armed while it is imported, it is patched once."""
    write(
        toy.folder.parent,
        toy.NAME,
        f"""
        import threading
        import hijack.hosts
        for _ in range(2):
            hijack.hosts.arm({toy.NAME!r})
        thread = threading.Thread(target=hijack.hosts.arm, args=({toy.NAME!r},))
        thread.start()
        thread.join()

        def detect(state_dict, prefix):
            return prefix
        """,
    )
    host = load(toy)
    assert host.detect({}, "a") == ("patched", "a")
    assert type(host.__spec__) is importlib.machinery.ModuleSpec
    hijack.hosts.unpatch(toy.NAME)
    assert host.detect({}, "a") == "a"


def test_unpatching_in_the_middle_of_an_import_disarms(toy):
    """A host that is armed and unpatched while it is imported stays as it is."""
    write(
        toy.folder.parent,
        toy.NAME,
        f"""
        import hijack.hosts
        hijack.hosts.arm({toy.NAME!r})
        hijack.hosts.unpatch({toy.NAME!r})

        def detect(state_dict, prefix):
            return prefix
        """,
    )
    host = load(toy)
    assert host.detect({}, "a") == "a"
    assert not hijack.hosts.status()[toy.NAME].patched
    assert type(host.__spec__) is importlib.machinery.ModuleSpec
    assert hijack.hosts.patch(toy.NAME).patched


@pytest.mark.parametrize("how", ["restored", "reloaded", "imported anew"])
def test_status_looks_and_patch_heals(toy, how):
    """A host that lost our patch is not called patched, and patch() puts it back."""
    host = load(toy)
    original = host.detect
    hijack.hosts.patch(toy.NAME)
    if how == "restored":
        host.detect = original
    elif how == "reloaded":
        importlib.reload(host)
    else:
        del sys.modules[toy.MODULE]
        host = load(toy)
    status = hijack.hosts.status()[toy.NAME]
    assert not status.patched
    assert f"{toy.MODULE}.detect" in status.reason
    assert "hijack.patch" in status.reason
    assert status.foreign == ()
    assert host.detect({}, "a") == ("a", [])
    healed = hijack.hosts.patch(toy.NAME)
    assert (healed.patched, healed.reason) == (True, "")
    assert host.detect({}, "a") == ("patched", ("a", []))
    hijack.hosts.unpatch(toy.NAME)
    assert host.detect({}, "a") == ("a", [])


def test_a_half_imported_host_that_fails_is_left_alone(toy):
    """If the host's import fails after arming, nothing is patched and nothing hangs."""
    write(
        toy.folder.parent,
        toy.NAME,
        f"""
        import hijack.hosts
        hijack.hosts.arm({toy.NAME!r})
        raise RuntimeError("host broke")
        """,
    )
    with pytest.raises(RuntimeError, match="host broke"):
        load(toy)
    assert not hijack.hosts.status()[toy.NAME].patched


@pytest.mark.parametrize("value", ["{}", "*", "other, {}"])
def test_disable_disarms(toy, monkeypatch, value):
    """HIJACK_DISABLE with the host's name, or *, leaves the host alone."""
    monkeypatch.setenv("HIJACK_DISABLE", value.format(toy.NAME))
    original = load(toy).detect
    status = hijack.hosts.arm(toy.NAME)
    assert not status.patched
    assert "HIJACK_DISABLE" in status.reason
    assert load(toy).detect is original


def test_what_was_patched_is_said_in_one_line_and_by_the_doctor(toy, caplog):
    """Names and versions; with the layers that the host has, if its adapter tells."""
    toy.describe_layers = lambda: ("a model: 3 layers",)
    load(toy)
    with caplog.at_level("INFO", "hijack"):
        hijack.hosts.arm(toy.NAME)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    assert line == f"hijack {hijack.__version__}: {toy.NAME} 2.0 patched: detect"
    assert hijack.hosts.status()[toy.NAME].patches == ("detect",)
    lines = str(diagnose()).splitlines()
    at = lines.index(f"{toy.NAME} 2.0: patched")
    assert lines[at + 1 : at + 3] == ["  patches: detect", "  a model: 3 layers"]
    hijack.hosts.unpatch(toy.NAME)
    assert hijack.hosts.status()[toy.NAME].patches == ()


@pytest.mark.parametrize(
    ("detect", "reason"),
    [
        ("def renamed(state_dict, prefix): ...", "does not exist"),
        ("def detect(state_dict): ...", "does not accept prefix"),
        ("detect = 1", "is not a function"),
    ],
)
def test_a_failed_probe_leaves_the_host_alone(toy, caplog, detect, reason):
    """A host without what we need goes on unpatched; one line and status say why."""
    write(toy.folder.parent, toy.NAME, detect)
    hijack.hosts.arm(toy.NAME)
    host = load(toy)
    before = dict(vars(host))
    status = hijack.hosts.patch(toy.NAME)
    assert dict(vars(host)) == before
    assert not status.patched
    assert reason in status.reason
    lines = {r.getMessage() for r in caplog.records if r.levelname == "WARNING"}
    assert len(lines) == 1
    assert reason in lines.pop()


def test_strict_raises_instead(toy, monkeypatch):
    """With HIJACK_STRICT=1 a failed probe is an error, even in the host's import."""
    monkeypatch.setenv("HIJACK_STRICT", "1")
    write(toy.folder.parent, toy.NAME, "x = 1")
    hijack.hosts.arm(toy.NAME)
    with pytest.raises(PatchError, match="does not exist"):
        load(toy)


@pytest.mark.parametrize("version", ["0.9", "2.6.1", "nightly"])
def test_an_unknown_version_with_good_probes_is_patched(toy, version):
    """Probes decide: a version nobody tested is patched, and status says it is not."""
    write(toy.folder.parent, toy.NAME, version=version)
    load(toy)
    status = hijack.hosts.patch(toy.NAME)
    assert status.patched
    assert "not tested" in status.reason
    assert "1.0 to 2.5" in status.reason


def test_versions_compare_as_numbers():
    """0.10 is newer than 0.9, and words after the numbers do not count."""
    assert version_key("0.10.1rc2") == (0, 10, 1)
    assert is_tested("0.10", ("0.9", "0.33.0"))
    assert is_tested("0.33.0", ("0.9", "0.33.0"))
    assert not is_tested("0.33.1", ("0.9", "0.33.0"))


def test_a_failing_patch_is_rolled_back_and_told(toy, monkeypatch):
    """If making a replacement fails, the host is as it was, and status says why."""
    host = load(toy)
    original = host.detect

    def fail(_):
        raise RuntimeError("no luck")

    good = toy.patches()
    bad = Patch(host, "detect", fail)
    monkeypatch.setattr(toy, "patches", lambda: [*good, bad])
    status = hijack.hosts.patch(toy.NAME)
    assert not status.patched
    assert "no luck" in status.reason
    assert host.detect is original


def test_foreign_patches_are_shown(toy):
    """status() names who patched the same function before and after us."""
    host = load(toy)
    first = host.detect

    def under(*args):
        return first(*args)

    host.detect = under
    hijack.hosts.patch(toy.NAME)
    ours = host.detect

    def over(*args):
        return ours(*args)

    host.detect = over
    before, after = hijack.hosts.status()[toy.NAME].foreign
    assert "before us" in before
    assert "under" in before
    assert "after us" in after
    assert "over" in after
    assert "over" in hijack.hosts.unpatch(toy.NAME).reason
    assert host.detect is over
    assert host.detect({}, "a") == ("a", [])


def test_unpatch_refuses_while_quantized_modules_live(toy):
    """With live modules unpatch names their number and does nothing, unless forced."""
    load(toy)
    hijack.hosts.patch(toy.NAME)
    toy.alive = 3
    with pytest.raises(PatchError, match="3 quantized modules"):
        hijack.hosts.unpatch(toy.NAME)
    assert hijack.hosts.status()[toy.NAME].patched
    assert hijack.hosts.status()[toy.NAME].live == 3
    assert not hijack.hosts.unpatch(toy.NAME, force=True).patched


def test_plugins_are_told_of_a_patched_host(toy):
    """hijack_host_patched is called, for plugins that come later too."""
    told = []

    class Plugin:
        @hijack.hookimpl
        def hijack_host_patched(self, host, version):
            told.append((host, version))

    load(toy)
    hijack.hosts.patch(toy.NAME)
    hijack.default_registry().add_plugin(Plugin(), f"listener of {toy.NAME}")
    assert (toy.NAME, "2.0") in told


def test_unknown_and_duplicate_hosts_are_refused(toy):
    """A wrong name lists the hosts that are known; a name cannot be taken twice."""
    with pytest.raises(PatchError, match=r"unknown host 'nix'; known are: .*comfyui"):
        hijack.hosts.patch("nix")
    with pytest.raises(PatchError, match="already known"):
        hijack.hosts.add_host(toy)


# -- the node pack ---------------------------------------------------------------------

ROOT = Path(__file__).parents[1]

PACK = """
import importlib.util, logging, sys, types
logging.basicConfig(stream=sys.stdout, format="%(message)s", level="INFO")
def run(path, name):
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[{root!r}] if name == {root!r} else None
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
def prestartup():
    return run({root!r} + "/prestartup_script.py", {root!r} + "/prestartup_script")
def pack():
    return run({root!r} + "/__init__.py", {root!r})
"""


def run_pack(code, tmp_path, **environment):
    """Run code in a process where hijack is only a clone in a folder, not installed."""
    text = PACK.format(root=str(ROOT)) + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prestartup_makes_hijack_importable_without_torch(tmp_path):
    """After the pre-start-up script anyone finds hijack; torch is not loaded yet."""
    out = run_pack(
        """
        prestartup()
        prestartup()
        assert "torch" not in sys.modules and "hijack" not in sys.modules
        assert sum(hasattr(f, "hijack_root") for f in sys.meta_path) == 1
        print(importlib.util.find_spec("hijack").origin)
        """,
        tmp_path,
    )
    assert Path(out.strip()) == ROOT / "hijack" / "__init__.py"


def test_the_pack_arms_comfyui_and_shares_its_modules(tmp_path):
    """Imported by its path in ComfyUI, the pack arms it through the one hijack."""
    out = run_pack(
        """
        sys.modules["comfy"] = types.ModuleType("comfy")
        prestartup()
        module = pack()
        assert module.NODE_CLASS_MAPPINGS == {}
        import hijack.hosts
        print(hijack.hosts.status()["comfyui"])
        print(sorted(hijack.schemes()))
        assert not any(path.endswith("main") for path in sys.path)
        """,
        tmp_path,
    )
    assert "waiting for comfy.sd" in out
    assert "blockwise_fp8" in out


def test_the_pack_is_harmless_outside_comfyui(tmp_path):
    """Imported by anything else, the root file neither imports nor installs."""
    run_pack(
        """
        pack()
        assert "hijack" not in sys.modules
        assert not any(hasattr(f, "hijack_root") for f in sys.meta_path)
        """,
        tmp_path,
    )


def test_a_missing_dependency_is_one_line_with_the_command(tmp_path):
    """Without wrapt the pack says what to install, and ComfyUI goes on."""
    (tmp_path / "wrapt.py").write_text(
        "raise ModuleNotFoundError('No module named wrapt', name='wrapt')"
    )
    out = run_pack(
        """
        sys.modules["comfy"] = types.ModuleType("comfy")
        print(pack().NODE_CLASS_MAPPINGS)
        """,
        tmp_path,
    )
    line, mappings = out.strip().splitlines()
    assert "wrapt is not installed" in line
    assert "pip install -r" in line
    assert mappings == "{}"


def test_a_broken_scheme_does_not_stop_comfyui(tmp_path):
    """Any other failure is one line too, and an error only if HIJACK_STRICT asks."""
    code = """
        sys.modules["comfy"] = types.ModuleType("comfy")
        sys.modules["schemes"] = types.ModuleType("schemes")
        try:
            pack()
        except Exception as error:
            print("raised", error)
        """
    assert "not loaded" in run_pack(code, tmp_path, HIJACK_STRICT="")
    assert "raised" in run_pack(code, tmp_path, HIJACK_STRICT="1")


def test_the_clone_wins_over_an_installed_copy_and_says_so(tmp_path):
    """With a second copy on the path the clone is used, and one line names both."""
    (tmp_path / "hijack").mkdir()
    (tmp_path / "hijack" / "__init__.py").write_text("")
    out = run_pack(
        """
        prestartup()
        prestartup()
        print(importlib.util.find_spec("hijack").origin)
        """,
        tmp_path,
    )
    line, file = out.strip().splitlines()
    assert str(tmp_path) in line
    assert str(ROOT) in line
    assert Path(file) == ROOT / "hijack" / "__init__.py"


def test_a_copy_that_is_imported_already_wins(tmp_path):
    """If some pack imported an installed hijack before, the clone steps back."""
    (tmp_path / "hijack").mkdir()
    (tmp_path / "hijack" / "__init__.py").write_text("")
    out = run_pack(
        """
        import hijack
        prestartup()
        assert not any(hasattr(f, "hijack_root") for f in sys.meta_path)
        """,
        tmp_path,
    )
    assert f"using the copy in {tmp_path}" in out


def test_probes_look_without_importing():
    """A probe of a module that is not imported fails, and does not import it."""
    assert "wave" not in sys.modules
    assert Probe("wave.open").problem() == "wave.open: module wave is not imported"
    assert "wave" not in sys.modules
    assert Probe("types.ModuleType").problem() is None
    assert isinstance(types.ModuleType, type)
