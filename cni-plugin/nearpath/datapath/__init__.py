"""The eBPF side: libbpf by ctypes, loading and pinning, typed maps."""
