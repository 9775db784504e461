/*
 * GNU screen puts the pseudo terminals it opens into packet mode (TIOCPKT) and gives up where it cannot; gVisor has no
 * packet mode. Preloaded into screen, this answers TIOCPKT itself and does what packet mode does for plain data: every
 * read from such a terminal starts with a byte of value 0. It also holds the other end of the terminal open until the
 * program in it wrote something or a child ended: gVisor answers EIO to a read from a terminal that nobody has opened
 * yet, where Linux waits, and screen takes that for the program's end. Where the kernel knows TIOCPKT nothing changes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_FD 4096

/* Of the terminals in our packet mode: the descriptor of the other end, while it is held. */
static struct { int on, other_end; } packet_mode[MAX_FD];

static void release(int fd)
{
	if (packet_mode[fd].other_end > 0)
		syscall(SYS_close, packet_mode[fd].other_end);
	packet_mode[fd].other_end = 0;
}

__attribute__((constructor)) static void start(void)
{
	/* For screen alone, not for what runs in its windows. */
	unsetenv("LD_PRELOAD");
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);
	int result = (int)syscall(SYS_ioctl, fd, request, argument);
	if (result < 0 && request == TIOCPKT && errno == ENOTTY && fd >= 0 && fd < MAX_FD) {
		char name[64];
		release(fd);
		packet_mode[fd].on = *(int *)argument;
		if (packet_mode[fd].on && ptsname_r(fd, name, sizeof name) == 0)
			packet_mode[fd].other_end = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
		return 0;
	}
	return result;
}

ssize_t read(int fd, void *buffer, size_t size)
{
	if (fd < 0 || fd >= MAX_FD || !packet_mode[fd].on || size < 2)
		return syscall(SYS_read, fd, buffer, size);
	ssize_t got = syscall(SYS_read, fd, (char *)buffer + 1, size - 1);
	if (got <= 0)
		return got;
	release(fd);
	*(char *)buffer = 0;
	return got + 1;
}

/* What read() is in a program that was compiled with _FORTIFY_SOURCE. */
ssize_t __read_chk(int fd, void *buffer, size_t size, size_t buffer_size)
{
	if (size > buffer_size)
		abort();
	return read(fd, buffer, size);
}

pid_t waitpid(pid_t pid, int *status, int options)
{
	pid_t ended = (pid_t)syscall(SYS_wait4, pid, status, options, NULL);
	for (int fd = 0; ended > 0 && fd < MAX_FD; fd++)
		release(fd);
	return ended;
}

int close(int fd)
{
	if (fd >= 0 && fd < MAX_FD && packet_mode[fd].on) {
		release(fd);
		packet_mode[fd].on = 0;
	}
	return (int)syscall(SYS_close, fd);
}
