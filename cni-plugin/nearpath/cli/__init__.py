"""The command line: what an operator sees."""
