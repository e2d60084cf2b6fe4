"""Parts of NF4: its tensors, and the dialect of bitsandbytes."""
