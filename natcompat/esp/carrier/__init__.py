"""Carriers: what moves packets between the sockets of ESP and the packet device."""
