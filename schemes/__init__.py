"""Weight formats that come with hijack; importing one registers it."""
