"""Real ComfyUI servers and processes for tests."""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
START_SECONDS = 180
PROMPT_SECONDS = 180


def releases():
    """Version to folder of every ComfyUI there is, oldest first.

    Raises:
        FileNotFoundError: if a folder of ``HIJACK_TEST_COMFYUI`` is not a ComfyUI.
    """
    named = os.environ.get("HIJACK_TEST_COMFYUI")
    if named is not None:
        folders = [Path(part) for part in named.split(os.pathsep) if part]
    else:
        files = Path("~/comfy").expanduser().glob("ComfyUI*/comfyui_version.py")
        folders = [file.parent for file in files]
    found = {version(folder): folder for folder in folders}
    return dict(sorted(found.items(), key=lambda item: _numbers(item[0])))


def version(folder):
    """The version a ComfyUI says it is."""
    text = (folder / "comfyui_version.py").read_text()
    return re.search(r'__version__ = "(.*)"', text).group(1)


def has_dynamic_vram(folder):
    """Whether a release can load weights when they are used, and has what it needs."""
    text = (folder / "comfy" / "model_patcher.py").read_text("utf-8")
    available = importlib.util.find_spec("comfy_aimdo") is not None
    return available and "class ModelPatcherDynamic" in text


def run_case(script, release, folder, *arguments):
    """What a script of ``tests/hosts`` found, in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, release, folder, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)]


def clone_repository(target):
    """Copy what git would clone, and what it would add, into a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_file() and not name.startswith(("tests/", "docs/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


class PromptError(Exception):
    """A prompt was refused or failed; the text is what the user would see."""


class Server:
    """A ComfyUI on a free port, with a base directory of its own.

    Args:
        release: folder of the ComfyUI.
        base: a folder that may be filled.
        models: folder whose files become diffusion models.
        packs: name in custom_nodes to a folder to link, or a function that fills it.
        environment: variables to add.
    """

    def __init__(self, release, base, models, packs=None, environment=None):
        self.release, self.base = Path(release), Path(base)
        self.environment = dict(environment or {})
        (self.base / "models" / "loras").mkdir(parents=True)
        (self.base / "models" / "diffusion_models").symlink_to(models)
        nodes = self.base / "custom_nodes"
        nodes.mkdir()
        (nodes / "pack_for_tests").symlink_to(HERE / "pack_for_tests")
        for name, pack in (packs or {}).items():
            if callable(pack):
                pack(nodes / name)
            else:
                (nodes / name).symlink_to(pack)
        self.log_path = self.base / "log.txt"
        self.port = _free_port()
        self.numbers = itertools.count()

    def __enter__(self):
        command = [
            sys.executable,
            str(HERE / "launch.py"),
            str(self.release),
            *("--cpu", "--listen", "127.0.0.1", "--port", str(self.port)),
            *("--disable-auto-launch", "--disable-api-nodes", "--dont-print-server"),
            *("--base-directory", str(self.base)),
            *("--database-url", "sqlite:///:memory:"),
        ]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.base,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        import psutil  # ComfyUI needs it, the rest of the tests do not

        family = []
        if self.process.poll() is None:
            server = psutil.Process(self.process.pid)
            family = [server, *server.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _wait(self):
        for _ in range(START_SECONDS * 4):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at start:\n{self.log()[-3000:]}")
            try:
                self._get("/system_stats")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
            else:
                return
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-3000:]}")

    def log(self):
        """Everything the server printed so far."""
        return self.log_path.read_text(errors="replace")

    def run(self, workflow):
        """Post a workflow and wait for it; give its entry in the history.

        Raises:
            PromptError: if it is refused or fails; the end of the log is printed.
        """
        body = json.dumps({"prompt": workflow}).encode()
        try:
            answer = self._get("/prompt", body)
        except urllib.error.HTTPError as error:
            raise self._prompt_error(error.read().decode()) from error
        for _ in range(PROMPT_SECONDS * 10):
            history = self._get(f"/history/{answer['prompt_id']}")
            if history:
                entry = history[answer["prompt_id"]]
                if entry["status"]["status_str"] != "success":
                    raise self._prompt_error(json.dumps(entry["status"]["messages"]))
                return entry
            time.sleep(0.1)
        raise RuntimeError(f"the prompt did not end:\n{self.log()[-3000:]}")

    def _prompt_error(self, text):
        # not in the exception's text, where tests would find words of other prompts
        print(self.log()[-3000:])
        return PromptError(text)

    def latent(self, model, **options):
        """Sample with a diffusion model and give the latent that was saved."""
        asked = workflow(model, **options)
        # A workflow that is cached to its end gives no outputs (0.8, 0.20), or the file
        # of the time before: under a name of its own, saving is never cached.
        asked["save"]["inputs"]["filename_prefix"] = f"test/{next(self.numbers)}"
        entry = self.run(asked)
        saved = entry["outputs"]["save"]["latents"][0]
        path = self.base / "output" / saved["subfolder"] / saved["filename"]
        return load_file(path)["latent_tensor"]

    def _get(self, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)


def workflow(model, weight_dtype="default", steps=2, seed=1):
    """UNETLoader, KSampler and SaveLatent, in the form the server takes."""
    return {
        "unet": {
            "class_type": "UNETLoader",
            "inputs": {
                "unet_name": f"{model}.safetensors",
                "weight_dtype": weight_dtype,
            },
        },
        "positive": {"class_type": "TestConditioning", "inputs": {"seed": 1}},
        "negative": {"class_type": "TestConditioning", "inputs": {"seed": 2}},
        "empty": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["unet", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["empty", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 2.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "save": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sampler", 0], "filename_prefix": f"test/{model}"},
        },
    }


def relative_error(actual, expected):
    """Relative L2 distance."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
