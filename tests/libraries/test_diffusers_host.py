"""diffusers as a host: its adapter leaves it as it found it."""

from hijack.testing import HostConformance

USE = """
from tests.libraries.diffusers_models import build, run
result = run(build("QwenImageTransformer2DModel"))
"""


class TestDiffusers(HostConformance):
    """Orders of import and patch, half imports, drift, patches of others."""

    adapter = "hijack.hosts.diffusers"
    use = USE
