"""IPsec in a kernel: what XFRM (`natcompat.xfrm`) and PF_KEY (`natcompat.pfkey`) have in common."""
