"""LoRA files merged into the weights of a checkpoint."""
