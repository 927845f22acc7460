"""NAT traversal sockets for IKE, the same on every operating system."""

__version__ = "0.1.0"
