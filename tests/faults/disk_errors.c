/* Loaded before the C library: the n-th call that changes something below a folder fails, or kills the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char below[4096];
static int fails_at, with_error; /* an error of 0 kills */
static volatile int calls;

void fail_at(const char *folder, int call, int error) {
    strncpy(below, folder, sizeof below - 1);
    fails_at = call, with_error = error, calls = 0;
}
int calls_made(void) { return calls; }

static int is_below(const char *path) { return below[0] && path && !strncmp(path, below, strlen(below)); }

static int is_open_below(int file) {
    char link[64], path[4096];
    if (!below[0] || file < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static int fails(void) {
    if (__sync_add_and_fetch(&calls, 1) != fails_at) return 0;
    if (!with_error) kill(getpid(), SIGKILL);
    errno = with_error;
    return 1;
}

#define REAL(name)                                   \
    static __typeof__(&name) real;                   \
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)
#define OPEN(name)                                                                            \
    int name(const char *path, int flags, ...) {                                              \
        REAL(name);                                                                           \
        va_list rest;                                                                         \
        va_start(rest, flags);                                                                \
        mode_t mode = va_arg(rest, int);                                                      \
        va_end(rest);                                                                         \
        if ((flags & O_ACCMODE) != O_RDONLY && is_below(path) && fails()) return -1;          \
        return real(path, flags, mode);                                                       \
    }
OPEN(open)
OPEN(open64)
ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    return is_open_below(file) && fails() ? -1 : real(file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return is_open_below(file) && fails() ? -1 : real(file, data, size, at);
}
int fsync(int file) {
    REAL(fsync);
    return is_open_below(file) && fails() ? -1 : real(file);
}
int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64);
    return is_open_below(file) && fails() ? -1 : real(file, size);
}
int close(int file) {
    REAL(close);
    if (!is_open_below(file) || !fails()) return real(file);
    int error = errno;
    real(file);
    errno = error;
    return -1;
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return is_below(to) && fails() ? -1 : real(from, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return is_below(path) && fails() ? -1 : real(path, mode);
}
int unlink(const char *path) {
    REAL(unlink);
    return is_below(path) && fails() ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return (folder == AT_FDCWD ? is_below(path) : is_open_below(folder)) && fails() ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    return is_below(path) && fails() ? -1 : real(path);
}
