// A disk that misbehaves: preloaded into the program, it stands before the C library's reads and writes of files whose
// path contains FAULT_PATH. FAULT says what happens; FAULT_AT is its number (calls, bytes or microseconds).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls, bytes_written;
// Of this thread: no request meets the same trouble again and again.
static __thread long own_calls;

static const char *fault(void) {
    const char *name = getenv("FAULT");
    return name ? name : "";
}

static int is(const char *name) { return strcmp(fault(), name) == 0; }

static long at(void) {
    const char *value = getenv("FAULT_AT");
    return value ? atol(value) : 0;
}

static int is_chosen(int fd) {
    char link[64], path[4096];
    const char *wanted = getenv("FAULT_PATH");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0 || !wanted) return 0;
    path[n] = 0;
    return strstr(path, wanted) != NULL;
}

static long random_below(long n) {
    static atomic_ulong state = 88172645463325252ul;
    unsigned long x = atomic_fetch_add(&state, 0x9e3779b97f4a7c15ul);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
    return (long)((x ^ (x >> 31)) % (unsigned long)n);
}

// Whether reads pass the page cache: those of a running model.
static int is_direct(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags != -1 && (flags & O_DIRECT);
}

// Somebody else empties the file.
static void cut(int fd) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (truncate(link, 0)) abort();
}

// What happens before a read: -1 if it fails, with errno set.
static int before_read(int fd) {
    if (is("eio")) { errno = EIO; return -1; }
    if (is("interrupted") && own_calls++ % 3 == 0) { errno = EINTR; return -1; }
    if (is_direct(fd)) {
        long call = atomic_fetch_add(&calls, 1);
        if (is("interrupted") && own_calls % 3 == 0) { errno = EAGAIN; return -1; }
        if (is("eio-at-first") && call < at()) { errno = EIO; return -1; }
        if (is("eio-later") && call >= at()) { errno = EIO; return -1; }
        if (is("cut") && call == at()) cut(fd);
    }
    if (is("slow")) usleep((useconds_t)at());
    if (is("jitter")) usleep((useconds_t)random_below(at()));
    return 0;
}

// What a read of n bytes tells: less, in whole blocks where the file is read past the page cache.
static ssize_t after_read(int fd, ssize_t n) {
    if (!is("short") || n < 2) return n;
    long unit = is_direct(fd) ? 4096 : 1;
    if (n <= unit) return n;
    return (1 + random_below((n - 1) / unit)) * unit;
}

ssize_t pread64(int fd, void *buf, size_t n, off64_t offset) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    if (!is_chosen(fd)) return real(fd, buf, n, offset);
    return before_read(fd) ? -1 : after_read(fd, real(fd, buf, n, offset));
}

ssize_t read(int fd, void *buf, size_t n) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    if (!is_chosen(fd)) return real(fd, buf, n);
    return before_read(fd) ? -1 : after_read(fd, real(fd, buf, n));
}

// Bytes of a write that the disk takes: fewer, or -1 with errno set.
static ssize_t room(size_t n) {
    long before = atomic_fetch_add(&bytes_written, (long)n);
    if (is("full") || is("write-eio")) {
        if (before >= at()) { errno = is("full") ? ENOSPC : EIO; return -1; }
        if (before + (long)n > at()) return at() - before;
    }
    return (ssize_t)n;
}

ssize_t write(int fd, const void *buf, size_t n) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (!is_chosen(fd)) return real(fd, buf, n);
    ssize_t taken = room(n);
    return taken < 0 ? -1 : real(fd, buf, (size_t)taken);
}

ssize_t pwrite64(int fd, const void *buf, size_t n, off64_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    if (!is_chosen(fd)) return real(fd, buf, n, offset);
    ssize_t taken = room(n);
    return taken < 0 ? -1 : real(fd, buf, (size_t)taken, offset);
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    if (is_chosen(fd) && is("sync-eio")) { errno = EIO; return -1; }
    return real(fd);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!real) real = dlsym(RTLD_NEXT, "copy_file_range");
    // Whoever copies then reads and writes.
    if (is_chosen(in) || is_chosen(out)) { errno = EXDEV; return -1; }
    return real(in, from, out, to, n, flags);
}
