/* A disk that is full from one call on: LD_PRELOAD, armed by `full_from(n, folder)` in the process that is tried.
 *
 * Counted is every call by which something below `folder` grows or becomes durable: write and its kin, fsync, rename,
 * link, mkdir, and open of a file that is not there. Call number n, from 0, and all after it answer ENOSPC (fsync and
 * rename too, as file systems that allocate late do); with `once` only that one. What removes files goes on working. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int armed, only_once;
static long seen, from;
static char below[PATH_MAX];

void full_from(long n, int once, const char *folder) {
    strncpy(below, folder, sizeof below - 1);
    from = n; only_once = once; seen = 0; armed = 1;
}
long full_seen(void) { return seen; }

static int is_full(void) {
    long number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    if (number == from || (number > from && !only_once)) { errno = ENOSPC; return 1; }
    return 0;
}
static int is_inside(const char *path) {
    size_t length = strlen(below);
    return strncmp(path, below, length) == 0 && (path[length] == '/' || path[length] == 0);
}
static int of_handle(int handle) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}
static int of_path(int folder, const char *path) {
    if (!armed) return 0;
    if (path[0] == '/') return is_inside(path);
    return folder == AT_FDCWD ? 0 : of_handle(folder);
}
#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int h, const void *b, size_t n) { REAL(write); if (of_handle(h) && is_full()) return -1; return real(h, b, n); }
ssize_t pwrite(int h, const void *b, size_t n, off_t o) { REAL(pwrite); if (of_handle(h) && is_full()) return -1; return real(h, b, n, o); }
ssize_t pwrite64(int h, const void *b, size_t n, off64_t o) { REAL(pwrite64); if (of_handle(h) && is_full()) return -1; return real(h, b, n, o); }
ssize_t writev(int h, const struct iovec *v, int n) { REAL(writev); if (of_handle(h) && is_full()) return -1; return real(h, v, n); }
ssize_t sendfile(int h, int i, off_t *o, size_t n) { REAL(sendfile); if (of_handle(h) && is_full()) return -1; return real(h, i, o, n); }
ssize_t sendfile64(int h, int i, off64_t *o, size_t n) { REAL(sendfile64); if (of_handle(h) && is_full()) return -1; return real(h, i, o, n); }
ssize_t copy_file_range(int i, off64_t *a, int h, off64_t *o, size_t n, unsigned f) { REAL(copy_file_range); if (of_handle(h) && is_full()) return -1; return real(i, a, h, o, n, f); }
int fsync(int h) { REAL(fsync); if (of_handle(h) && is_full()) return -1; return real(h); }
int fdatasync(int h) { REAL(fdatasync); if (of_handle(h) && is_full()) return -1; return real(h); }
int ftruncate(int h, off_t n) { REAL(ftruncate); if (n && of_handle(h) && is_full()) return -1; return real(h, n); }
int ftruncate64(int h, off64_t n) { REAL(ftruncate64); if (n && of_handle(h) && is_full()) return -1; return real(h, n); }
int rename(const char *a, const char *b) { REAL(rename); if (of_path(AT_FDCWD, b) && is_full()) return -1; return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) { REAL(renameat); if (of_path(y, b) && is_full()) return -1; return real(x, a, y, b); }
int link(const char *a, const char *b) { REAL(link); if (of_path(AT_FDCWD, b) && is_full()) return -1; return real(a, b); }
int linkat(int x, const char *a, int y, const char *b, int f) { REAL(linkat); if (of_path(y, b) && is_full()) return -1; return real(x, a, y, b, f); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); if (of_path(AT_FDCWD, p) && access(p, F_OK) && is_full()) return -1; return real(p, m); }
int mkdirat(int d, const char *p, mode_t m) { REAL(mkdirat); if (of_path(d, p) && faccessat(d, p, F_OK, 0) && is_full()) return -1; return real(d, p, m); }

static int opened(int d, const char *p, int flags) { return (flags & O_CREAT) && of_path(d, p) && faccessat(d, p, F_OK, 0) && is_full(); }
#define MODE mode_t m = 0; if (flags & O_CREAT) { va_list more; va_start(more, flags); m = va_arg(more, mode_t); va_end(more); }
int open(const char *p, int flags, ...) { REAL(open); MODE if (opened(AT_FDCWD, p, flags)) return -1; return real(p, flags, m); }
int open64(const char *p, int flags, ...) { REAL(open64); MODE if (opened(AT_FDCWD, p, flags)) return -1; return real(p, flags, m); }
int openat(int d, const char *p, int flags, ...) { REAL(openat); MODE if (opened(d, p, flags)) return -1; return real(d, p, flags, m); }
int openat64(int d, const char *p, int flags, ...) { REAL(openat64); MODE if (opened(d, p, flags)) return -1; return real(d, p, flags, m); }
