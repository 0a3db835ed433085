"""nearpath: node-local network acceleration as a chained CNI plugin."""

VERSION = "0.1.0"
