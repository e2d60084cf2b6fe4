"""Patching hosts: programs that load models and do not know hijack."""

from __future__ import annotations

from hijack.hosts.manager import (
    HostStatus,
    add_host,
    arm,
    arm_all,
    patch,
    status,
    unpatch,
)

__all__ = ["HostStatus", "add_host", "arm", "arm_all", "patch", "status", "unpatch"]
