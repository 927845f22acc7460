"""ESP in this process (RFC 4303): no kernel and no privilege needed.

`engine` has the protocol and the databases and does no I/O; `datapath` is its second data path, in C.
`carrier` moves packets between sockets and a packet device (`device`), and `userspace` is all of that as one
`natcompat.ipsec.IPsec`.
"""
