/*
 * User Mode Linux of 6.1 keeps 2696 bytes of a process's extended processor state, all of it on a
 * processor without AMX. Where there is AMX the host's kernel takes only the whole of it
 * (xstateregs_set() in arch/x86/kernel/fpu/regset.c, else EFAULT), and every node panics at its
 * first process. Loaded before libc, this adds what is missing: zeroes, which is the state of
 * tiles that nobody may use, as no process of a node has asked the host for them.
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

/* Not on the stack: a kernel's is small. A node has one processor, and only it calls this. */
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
		/* How much it is: the kernel cuts the length down to that. */
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
