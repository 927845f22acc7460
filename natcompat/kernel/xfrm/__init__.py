"""IPsec of the Linux kernel: security associations and policies over XFRM netlink."""
