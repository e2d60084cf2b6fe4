"""How files store quantized weights: dialects, claims and detection."""
