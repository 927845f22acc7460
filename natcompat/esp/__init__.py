"""ESP in this process (RFC 4303): no kernel, no privilege, no I/O. `natcompat.esp.engine` is the way in.

`packet`, `replay` and `crypto` are the protocol, `association` is the state of one SA, `databases`
finds it, `events` tells of it, `engine` is all of that as one `natcompat.ipsec.IPsec`. `device` is where
inner packets come from and go to.
"""
