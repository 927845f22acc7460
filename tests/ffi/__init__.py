"""Programs in C that try the C data path by itself, and what builds them."""
