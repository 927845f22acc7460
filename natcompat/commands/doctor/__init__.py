"""``natcompat doctor``: what works on this machine, why, and what would help."""
