"""The CNI plugin: protocol, network configuration, commands."""
