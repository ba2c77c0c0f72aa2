"""Make the C allocator keep freed memory, which about halves the time of small networks on the CPU.

glibc hands large blocks back to the system as soon as they are free, so every activation is page-faulted anew
in every operation. A program may change that for its process, a library should not: only the command line and
the benchmarks call this.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tune glibc's malloc for this process; False (and no change) where the C library is another one."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return all(libc.mallopt(key, value) == 1 for key, value in settings)
