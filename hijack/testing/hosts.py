"""The conformance kit for hosts: proof that an adapter leaves a host as it found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest


class HostConformance:
    """Every test of a host's adapter, each in processes where nothing is imported yet.

    Subclass it under a name that starts with ``Test`` and say which adapter is tested::

        class TestToyhost(hijack.testing.HostConformance):
            adapter = "toyhost_hijack"
            use = "import toyhost; result = toyhost.run(1.0)"

    Attributes:
        adapter: dotted name of the adapter, a module with the names of
            `hijack.hosts.adapter.Adapter`; ``module:name`` for an object in one.
        setup: code to run before the host is imported, such as to find it.
        use: code that uses the host with dense weights and leaves what it computed in
            ``result``: tensors, or what holds tensors.
        timeout: seconds that a test may take.
    """

    adapter: str
    setup: str = ""
    use: str = ""
    timeout: float = 240.0

    def test_any_order_of_steps_leaves_the_host_as_it_was(self) -> None:
        """Importing, patching and taking the patches out, in every order."""
        self._run("orders")

    def test_a_half_imported_host_is_patched_when_it_is_ready(self) -> None:
        """Also where its import fails the first time."""
        self._run("half_imported")

    def test_a_host_that_has_changed_is_left_alone(self) -> None:
        """With each of the things that the adapter needs taken away."""
        self._run("drift")

    def test_patches_of_others_are_shown_and_stay(self) -> None:
        """Those that were there before ours, and those over ours."""
        self._run("foreign")

    def test_a_plugin_that_fails_stops_nothing(self) -> None:
        """It is kept for the doctor."""
        self._run("raising_plugin")

    def test_the_host_can_be_disabled(self) -> None:
        """By ``HIJACK_DISABLE``."""
        self._run("disabled")

    def test_the_doctor_sees_the_host(self) -> None:
        """With its version."""
        self._run("doctor")

    def test_dense_weights_give_the_same_bits(self) -> None:
        """Before and after the host is patched."""
        if not self.use:
            pytest.skip("the test says no code that uses the host")
        self._run("inert")

    def _run(self, check: str) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("needs processes that fork")
        with tempfile.TemporaryDirectory() as folder:
            subject = {"adapter": self.adapter}
            for name, code in (("setup", self.setup), ("use", self.use)):
                path = Path(folder) / f"{name}.py"
                path.write_text(code, "utf-8")
                subject[name] = str(path)
            self._run_process(check, subject)

    def _run_process(self, check: str, subject: Mapping[str, str]) -> None:
        # hijack is imported, and leaves the host alone until a check wants it
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HIJACK_DISABLE": "*",
        }
        done = subprocess.run(
            [sys.executable, "-m", "hijack.testing.host_process", check],
            input=json.dumps(subject),
            env=environment,
            capture_output=True,
            text=True,
            timeout=self.timeout,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "all passed" in done.stdout, done.stdout
