"""Builds natcompat.backends._solaris: what Solaris and illumos define, from their own headers.

    python ffi/solaris/build_solaris.py     builds it in place, for working in this tree

cffi in API mode, so that the system's compiler tells every number and layout, and a definition that a
system does not have fails the build. The package's own build comes here on SunOS, if cffi can be imported
(``pip install --no-build-isolation``); without it, or without a compiler, the package uses ctypes.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any, Final

from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "natcompat.backends._solaris"

DEFINITIONS: Final = """
#define UDP_NAT_T_ENDPOINT ...
#define IP_SEC_OPT ...
#define IPV6_SEC_OPT ...
#define IPSEC_PREF_NEVER ...
#define IPSEC_PREF_REQUIRED ...
#define IPSEC_PREF_UNIQUE ...

typedef struct {
    unsigned int ipsr_ah_req, ipsr_esp_req, ipsr_self_encap_req;
    uint8_t ipsr_auth_alg, ipsr_esp_alg, ipsr_esp_auth_alg;
    ...;
} ipsec_req_t;

#define PF_KEY_V2 ...
#define SADB_SATYPE_ESP ...
#define SADB_X_EXT_ADDRESS_NATT_LOC ...
#define SADB_X_EXT_ADDRESS_NATT_REM ...
#define SADB_X_SAFLAGS_NATT_LOC ...
#define SADB_X_SAFLAGS_NATT_REM ...
#define SADB_X_SAFLAGS_TUNNEL ...

typedef struct { ...; } sadb_msg_t;
typedef struct { ...; } sadb_sa_t;
typedef struct { ...; } sadb_address_t;

static const char *const PRIV_SYS_IP_CONFIG;
static const char *const PRIV_SYS_NET_CONFIG;
static const char *const PRIV_NET_RAWACCESS;

int priv_ineffect(const char *privilege);
int natcompat_kstat(const char *module, const char *name, const char *statistic, uint64_t *value);
"""

SOURCE: Final = """
#include <sys/types.h>
#include <stdint.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <net/pfkeyv2.h>
#include <priv.h>
#include <kstat.h>

/* Puts the statistic of instance 0 into *value; -1 where the kernel has none. */
static int natcompat_kstat(const char *module, const char *name, const char *statistic, uint64_t *value)
{
    kstat_ctl_t *control = kstat_open();
    kstat_t *kstat;
    kstat_named_t *named;
    int found = -1;

    if (control == NULL)
        return -1;
    kstat = kstat_lookup(control, (char *)module, 0, (char *)name);
    if (kstat != NULL && kstat_read(control, kstat, NULL) != -1) {
        named = kstat_data_lookup(kstat, (char *)statistic);
        if (named != NULL) {
            found = 0;
            switch (named->data_type) {
            case KSTAT_DATA_INT32: *value = (uint64_t)named->value.i32; break;
            case KSTAT_DATA_UINT32: *value = named->value.ui32; break;
            case KSTAT_DATA_INT64: *value = (uint64_t)named->value.i64; break;
            case KSTAT_DATA_UINT64: *value = named->value.ui64; break;
            default: found = -1;
            }
        }
    }
    kstat_close(control);
    return found;
}
"""


def prepare(extension: Extension, directory: str) -> None:
    """Have cffi write the C of `extension` below `directory`; CompileError says why it cannot be."""
    try:
        import cffi
    except ImportError as error:
        raise CompileError(f"the extension takes cffi: {error}") from None
    builder: Any = cffi.FFI()
    builder.cdef(DEFINITIONS)
    builder.set_source(NAME, SOURCE)
    target = Path(directory) / "_solaris.c"
    target.parent.mkdir(parents=True, exist_ok=True)
    builder.emit_c_code(str(target))
    extension.sources = [str(target)]


def main() -> None:
    """Build it in place, or fail."""
    if platform.system() != "SunOS":
        sys.exit("this extension is for Solaris and illumos")
    extension = Extension(NAME, sources=[], libraries=["kstat", "socket", "nsl"])
    directory = ROOT / "build" / "solaris"
    prepare(extension, str(directory))
    distribution = Distribution(
        {
            "name": "natcompat",
            "packages": ["natcompat", "natcompat.backends"],
            "package_dir": {"": str(ROOT)},
            "ext_modules": [extension],
        }
    )
    command = build_ext(distribution)
    command.inplace = True
    command.build_temp = str(directory)
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main()
