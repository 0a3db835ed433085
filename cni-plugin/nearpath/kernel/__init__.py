"""Doors to the kernel other than bpf(2): namespaces, links, features, mounts."""
