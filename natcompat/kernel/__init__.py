"""IPsec in a kernel: what `natcompat.kernel.xfrm` and `natcompat.kernel.pfkey` have in common."""
