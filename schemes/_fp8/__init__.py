"""Parts of the block-wise FP8 scheme: blocks, decoding, quantizing, dialects."""
