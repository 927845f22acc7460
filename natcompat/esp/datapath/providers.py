"""The choice of the library for the ciphers of the data path in C."""

from __future__ import annotations

from natcompat.esp.datapath.compiled import ffi, lib
from natcompat.ipsec import Encr, Integ


def best_provider() -> str | None:
    """Return the library that does most ciphers here, by its name; None: there is none."""
    path = lib.esp_path_new(ffi.NULL)
    if not path:
        return None
    try:
        name = lib.esp_provider(path, Encr.AES_GCM_16, Integ.NONE, 20)
        return ffi.string(name).decode() if name else None
    finally:
        lib.esp_path_release(path)
