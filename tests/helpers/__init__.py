"""What the tests share: real namespaces, runtimes, traffic, captures and leak checks."""
