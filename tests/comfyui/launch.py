"""Run a ComfyUI on a machine without torchvision's compiled half.

``python launch.py COMFYUI ARGUMENT ...`` runs its ``main.py``. As a module, `prepare`
makes ``comfy`` importable in this process.
"""

import os
import runpy
import sys

import torch

#: Held for the life of the process; a library that is collected forgets its operators.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def define_operators():
    """Declare what torchvision registers from C++ and checks for at import."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def prepare(root, *arguments):
    """Make one ComfyUI importable, as if started with these arguments."""
    define_operators()
    sys.path.insert(0, str(root))
    sys.argv = [os.path.join(str(root), "main.py"), "--cpu", *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()


if __name__ == "__main__":
    define_operators()
    root = sys.argv[1]
    sys.argv = [os.path.join(root, "main.py"), *sys.argv[2:]]
    sys.path.insert(0, root)
    runpy.run_path(sys.argv[0], run_name="__main__")
