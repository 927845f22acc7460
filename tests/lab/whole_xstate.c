/*
 * User Mode Linux gives ptrace() a buffer for the vector registers that is as large as they were when it was
 * written. Processors with AMX have more of them, and their kernels refuse to set a part (EFAULT from
 * xstateregs_set() in arch/x86/kernel/fpu/regset.c), so the guest dies with its first process. Loaded with LD_PRELOAD,
 * this sets the whole: what was given, and of the rest what the registers hold.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

static unsigned char whole[1 << 16] __attribute__((aligned(64)));

long ptrace(enum __ptrace_request request, ...)
{
    static long (*real)(enum __ptrace_request, pid_t, void *, void *);
    va_list arguments;

    va_start(arguments, request);
    pid_t process = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "ptrace");

    long result = real(request, process, address, data);
    if (result == 0 || errno != EFAULT || request != PTRACE_SETREGSET || address != (void *)NT_X86_XSTATE)
        return result;

    const struct iovec *given = data;
    struct iovec all = {whole, sizeof whole};
    if (real(PTRACE_GETREGSET, process, address, &all) < 0)
        return -1;
    if (given->iov_len > all.iov_len) {
        errno = EFAULT;
        return -1;
    }
    memcpy(whole, given->iov_base, given->iov_len);
    return real(PTRACE_SETREGSET, process, address, &all);
}
