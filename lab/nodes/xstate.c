/*
 * User Mode Linux 6.1 saves 2696 bytes of a process's extended processor state, which is all of it
 * on a processor without AMX. With AMX, the host's kernel accepts only the complete state
 * (xstateregs_set() in arch/x86/kernel/fpu/regset.c, else EFAULT), and every node panics at its
 * first process. Preloaded, this library appends the missing bytes as zeros: the initial state of
 * AMX, which no process of a node can have changed, as none has requested it from the host.
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

typedef long (*ptrace_call)(int request, pid_t pid, void *addr, void *data);

/* Static, because a kernel's stack is small. A node has one processor, so there is one caller. */
static unsigned char state[1 << 16] __attribute__((aligned(64)));
static size_t whole;

long ptrace(enum __ptrace_request request, ...)
{
	static ptrace_call next;
	struct iovec *given, full = { state, sizeof(state) };
	void *addr, *data;
	va_list rest;
	pid_t pid;
	long done;

	va_start(rest, request);
	pid = va_arg(rest, pid_t);
	addr = va_arg(rest, void *);
	data = va_arg(rest, void *);
	va_end(rest);
	if (!next)
		next = (ptrace_call)dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || (long)addr != NT_X86_XSTATE)
		return next(request, pid, addr, data);
	if (!whole) {
		done = next(request, pid, addr, data);
		if (done == 0 || errno != EFAULT)
			return done;
		/* Get the full size: the kernel reduces the length to it. */
		if (next(PTRACE_GETREGSET, pid, addr, &full) != 0)
			return -1;
		memset(state, 0, sizeof(state));
		whole = full.iov_len;
	}
	given = data;
	memcpy(state, given->iov_base, given->iov_len < whole ? given->iov_len : whole);
	full.iov_len = whole;
	return next(request, pid, addr, &full);
}
