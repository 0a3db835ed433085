"""The lanes: what nearpath does for one attachment, one module per lane."""
