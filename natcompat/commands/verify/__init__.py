"""``natcompat verify``: the contract, tried row by row on real sockets."""
