"""Run by tests in a fresh process: a host is the same after any order of steps.

Usage: orders.py HOST MODULE [OWNER ...]

Steps are letters: i imports MODULE, p patches, u unpatches. Each order runs in its own
process, forked from this one. After an order that ends with u, ``vars()`` of every
OWNER (a dotted name, or MODULE itself) must hold the same objects as before.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
import traceback
import types

import wrapt

import hijack
import hijack.hosts

ORDERS = (
    *map("".join, itertools.permutations("ipu")),
    *("ipupu", "pipuu", "uipp", "ppiuu", "ipuip"),
)


def owner(path):
    """The module or class of a dotted name; its module is imported."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        found = sys.modules.get(".".join(parts[:length]))
        if found is not None:
            break
    for part in parts[length:]:
        found = getattr(found, part)
    return found


def run(order, host, module, owners):
    """One order; raises AssertionError if the host is not what it should be."""
    before = {}

    def snapshot(_):
        before.update({path: dict(vars(owner(path))) for path in owners})

    # registered before hijack registers its own, so that it sees the host untouched
    wrapt.register_post_import_hook(snapshot, module)
    armed = False
    for step in order:
        if step == "i":
            importlib.import_module(module)
        elif step == "p":
            hijack.hosts.patch(host)
            armed = True
        else:
            hijack.hosts.unpatch(host)
            armed = False
        status = hijack.hosts.status()[host]
        expected = armed and module in sys.modules
        assert status.patched == expected, f"{order} at {step}: {status}"
    for path in owners:
        after = dict(vars(owner(path)))
        changed = {
            name
            for name in after.keys() | before[path].keys()
            if after.get(name) is not before[path].get(name)
            and not isinstance(after.get(name), types.ModuleType)  # imports set those
        }
        assert bool(changed) == (armed and path == module), (
            f"{order}: {path}: {changed}"
        )


def warm_up(module):
    """Import what the host imports, but nothing of the host: orders then start fast."""
    names, write = os.pipe()
    if os.fork() == 0:
        importlib.import_module(module)
        loaded = [n for n in sys.modules if not n.startswith(module.partition(".")[0])]
        with open(write, "w") as pipe:
            pipe.write(" ".join(loaded))
        os._exit(0)
    os.close(write)
    with open(names) as pipe:
        for name in pipe.read().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    os.wait()


def main(host, module, *owners, orders=ORDERS):
    """Every order in a process of its own; returns the number that failed."""
    warm_up(module)
    failed = 0
    for order in orders:
        child = os.fork()
        if child == 0:
            try:
                run(order, host, module, (module, *owners))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)  # without cleaning up what the parent still uses
        failed += os.waitpid(child, 0)[1] != 0
    print(f"{len(orders)} orders, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
