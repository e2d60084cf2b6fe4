"""A node pack for tests: small models, and conditioning without a text encoder."""

import comfy.supported_models
import torch

#: Detection reads only channels and layers from a file; the width of a small model has
#: to be put where ComfyUI keeps what detection does not find.
SMALL = {"num_attention_heads": 2, "joint_attention_dim": 192}

comfy.supported_models.QwenImage.unet_extra_config = SMALL


class TestConditioning:
    """Conditioning that depends on nothing but its seed."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's own name
        """One number."""
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        """Give (1, 7, 192) normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, 7, 192, generator=generator), {}]],)


NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning}
