"""Builds natcompat.esp.datapath.compiled, the C data path: cffi in API mode, out of line, no GIL in calls.

    python ffi/build_datapath.py                       builds it in place, for working in this tree
    python ffi/build_datapath.py --into DIR -- FLAGS   builds it into a directory, with flags of yours

The package's own build comes here through pyproject.toml. The extension is optional: without a
compiler, Python's headers or a library for the ciphers the package is what it is, in pure Python.
"""

from __future__ import annotations

import argparse
import platform
import re
import runpy
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE: Final = Path(__file__).parent
NAME: Final = "natcompat.esp.datapath.compiled"
_SOLARIS: Final = "natcompat.backends._solaris"

HEADERS: Final = [
    "esp/esp.h",
    "esp/control.h",
    "offload/checksum.h",
    "offload/offload.h",
    "loop/values.h",
    "loop/loop.h",
]
"""What Python sees of it stands in these between two marks, and is put together in this order."""

FLAGS: Final = ["-O2", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]

_LIBCRYPTO: Final = """
#include <openssl/evp.h>
#if OPENSSL_VERSION_NUMBER < 0x30000000L
#error "ciphers are fetched, which OpenSSL does since 3.0"
#endif
int main(void) { return EVP_CIPHER_fetch(0, "AES-128-GCM", 0) == 0; }
"""
_IPSEC_MB: Final = """
#include <intel-ipsec-mb.h>
#if !defined __x86_64__ || IMB_VERSION_NUM < IMB_VERSION(1, 0, 0)
#error "another processor, or an old version"
#endif
int main(void) { return 0; }
"""


def definitions() -> str:
    """Return the declarations for cffi."""
    marked = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.DOTALL)
    ours = ("".join(marked.findall((HERE / name).read_text())) for name in HEADERS)
    return "".join(("struct iovec { void *iov_base; size_t iov_len; };", *ours))


class BuildDatapath(build_ext):  # type: ignore[misc]
    """Finds out which libraries are here, and has cffi write the module's C."""

    def finalize_options(self) -> None:
        """Leave out what is for another system."""
        super().finalize_options()
        if platform.system() != "SunOS":
            self.extensions: list[Extension] = [
                each for each in self.distribution.ext_modules or [] if each.name != _SOLARIS
            ]

    def get_source_files(self) -> list[str]:
        """Return what goes into the source distribution, which is for every system."""
        return [*super().get_source_files(), "ffi/solaris/build_solaris.py"]

    def build_extension(self, ext: Extension) -> None:
        """Build the data path, or what Solaris has instead."""
        if ext.name == _SOLARIS:
            # by its path: the root of the project is not on sys.path here
            runpy.run_path(str(HERE / "solaris" / "build_solaris.py"))["prepare"](ext, self.build_temp)
            super().build_extension(ext)
            return
        if sys.platform != "linux":
            raise CompileError("the C data path is for Linux")
        try:
            import cffi
        except ImportError as error:
            raise CompileError(f"the C data path takes cffi: {error}") from None
        libcrypto, ipsec_mb = self._links(_LIBCRYPTO, "crypto"), self._links(_IPSEC_MB)
        if not libcrypto and not ipsec_mb:
            raise CompileError("the C data path takes a compiler, and libssl-dev or libipsec-mb-dev")
        builder = cffi.FFI()
        builder.cdef(definitions())
        builder.set_source(NAME, "".join(f'#include "{name}"\n' for name in HEADERS))
        target = Path(self.build_temp) / "compiled.c"
        target.parent.mkdir(parents=True, exist_ok=True)
        builder.emit_c_code(str(target))
        ext.sources = [str(target), *(str(HERE.parent / name) for name in ext.sources)]
        ext.depends = [str(each) for each in HERE.rglob("*.[ch]")]
        ext.include_dirs = [str(HERE)]
        ext.extra_compile_args = [*FLAGS, *ext.extra_compile_args]
        ext.define_macros = [("WITH_LIBCRYPTO", str(int(libcrypto))), ("WITH_IPSEC_MB", str(int(ipsec_mb)))]
        ext.libraries = ["crypto"] if libcrypto else []
        super().build_extension(ext)

    def _links(self, program: str, *libraries: str) -> bool:
        """Tell whether `program` can be built here."""
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=directory, extra_postargs=["-w"])
                self.compiler.link_executable(objects, "probe", output_dir=directory, libraries=libraries)
            except Exception:  # noqa: BLE001 - whatever keeps it from being built
                return False
        return True


def main() -> None:
    """Build it, or fail."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--into", type=Path, help="a directory; without it, the package's own")
    parser.add_argument("flags", nargs="*", help="for compiler and linker")
    options = parser.parse_args()
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    (declared,) = (each for each in project["tool"]["setuptools"]["ext-modules"] if each["name"] == NAME)
    command = BuildDatapath(
        Distribution(
            {
                "name": "natcompat",
                "packages": ["natcompat", "natcompat.esp", "natcompat.esp.datapath"],
                "package_dir": {"": str(HERE.parent)},
                "ext_modules": [
                    Extension(
                        NAME,
                        sources=declared["sources"],
                        extra_compile_args=options.flags,
                        extra_link_args=options.flags,
                    )
                ],
            }
        )
    )
    command.inplace = options.into is None
    command.build_lib = str(options.into)
    command.build_temp = str(options.into or HERE.parent / "build" / "datapath")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main()
