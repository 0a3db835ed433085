"""Work that concerns the whole node rather than one attachment."""
