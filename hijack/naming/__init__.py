"""Names of layers: one layer has many, and each is brought to a normal form."""
