"""safetensors files: headers, reading, planning, writing in one piece."""
