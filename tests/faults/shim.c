/* Stands between a process and the C library's file calls: counts those that change files below one folder, and makes one
 * of them fail, come up short, or kill the process. Loaded with LD_PRELOAD, so calls of Python and of Rust come through
 * here alike; does nothing until faults_arm. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN_WRITE = 1, WRITE = 2, SYNC = 4, RENAME = 8, MKDIR = 16, REMOVE = 32, TRUNCATE = 64, MODE = 128, OPEN_READ = 256 };
enum { COUNT, SIGNAL, FAIL, SHORT };

static char root[PATH_MAX];
static size_t root_length;
static int armed, action, value, sticky;
static unsigned kinds;
static long nth;
static _Atomic long counted;

/* From now on calls of `kinds` below `folder`, which is the working directory, count; the one numbered `number` (from 1)
 * gets `what`: `with` is a signal or an errno. With `lasting`, so do all after it. */
void faults_arm(const char *folder, unsigned mask, long number, int what, int with, int lasting) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    kinds = mask;
    nth = number;
    action = what;
    value = with;
    sticky = lasting;
    atomic_store(&counted, 0);
    armed = 1;
}

long faults_counted(void) { return atomic_load(&counted); }

static int inside_path(const char *path) {
    if (path[0] != '/') return strncmp(path, "..", 2) != 0;
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int inside_descriptor(int descriptor) {
    char link[64], target[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, target, sizeof target - 1);
    if (length <= 0) return 0;
    target[length] = 0;
    return target[0] == '/' && inside_path(target);
}

static int inside_at(int folder, const char *path) {
    if (path[0] == '/' || folder == AT_FDCWD) return inside_path(path);
    return inside_descriptor(folder);
}

/* FAIL with errno set, SHORT, or COUNT: go on as if nothing were. */
static int reached(unsigned kind, int is_inside) {
    if (!is_inside) return COUNT;
    const long number = atomic_fetch_add(&counted, 1) + 1;
    if (nth == 0 || number < nth || (number > nth && !sticky)) return COUNT;
    if (action == SIGNAL) {
        kill(getpid(), value);
        return COUNT;
    }
    if (action == SHORT && number == nth && (kind & WRITE)) return SHORT;
    if (action == COUNT) return COUNT;
    errno = value;
    return FAIL;
}

#define COUNTS(kind) (armed && (kinds & (kind)))
#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static unsigned open_kind(int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) ? OPEN_WRITE : OPEN_READ;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        const unsigned kind = open_kind(flags); \
        if (COUNTS(kind) && reached(kind, inside_path(path)) == FAIL) return -1; \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        const unsigned kind = open_kind(flags); \
        if (COUNTS(kind) && reached(kind, inside_at(folder, path)) == FAIL) return -1; \
        return real(folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define WRITES(name, parameters, arguments, descriptor, size, halved) \
    ssize_t name parameters { \
        REAL(name); \
        if (COUNTS(WRITE)) { \
            const int what = reached(WRITE, inside_descriptor(descriptor)); \
            if (what == FAIL) return -1; \
            if (what == SHORT && (size) > 1) return real halved; \
        } \
        return real arguments; \
    }
WRITES(write, (int d, const void *b, size_t n), (d, b, n), d, n, (d, b, n / 2))
WRITES(pwrite, (int d, const void *b, size_t n, off_t o), (d, b, n, o), d, n, (d, b, n / 2, o))
WRITES(pwrite64, (int d, const void *b, size_t n, off64_t o), (d, b, n, o), d, n, (d, b, n / 2, o))
WRITES(writev, (int d, const struct iovec *v, int n), (d, v, n), d, n, (d, v, n / 2))
ssize_t sendfile(int out, int in, off_t *offset, size_t count);
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count);
WRITES(sendfile, (int d, int s, off_t *o, size_t n), (d, s, o, n), d, n, (d, s, o, n / 2))
WRITES(sendfile64, (int d, int s, off64_t *o, size_t n), (d, s, o, n), d, n, (d, s, o, n / 2))
WRITES(copy_file_range, (int s, off64_t *so, int d, off64_t *o, size_t n, unsigned f), (s, so, d, o, n, f), d, n, \
       (s, so, d, o, n / 2, f))

#define SIMPLE(name, kind, place, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        if (COUNTS(kind) && reached(kind, place) == FAIL) return -1; \
        return real arguments; \
    }
SIMPLE(fsync, SYNC, inside_descriptor(d), (int d), (d))
SIMPLE(fdatasync, SYNC, inside_descriptor(d), (int d), (d))
SIMPLE(ftruncate, TRUNCATE, inside_descriptor(d), (int d, off_t n), (d, n))
SIMPLE(ftruncate64, TRUNCATE, inside_descriptor(d), (int d, off64_t n), (d, n))
SIMPLE(rename, RENAME, inside_path(b), (const char *a, const char *b), (a, b))
SIMPLE(renameat, RENAME, inside_at(g, b), (int f, const char *a, int g, const char *b), (f, a, g, b))
SIMPLE(renameat2, RENAME, inside_at(g, b), (int f, const char *a, int g, const char *b, unsigned n), (f, a, g, b, n))
SIMPLE(mkdir, MKDIR, inside_path(p), (const char *p, mode_t m), (p, m))
SIMPLE(mkdirat, MKDIR, inside_at(f, p), (int f, const char *p, mode_t m), (f, p, m))
SIMPLE(unlink, REMOVE, inside_path(p), (const char *p), (p))
SIMPLE(unlinkat, REMOVE, inside_at(f, p), (int f, const char *p, int n), (f, p, n))
SIMPLE(rmdir, REMOVE, inside_path(p), (const char *p), (p))
SIMPLE(chmod, MODE, inside_path(p), (const char *p, mode_t m), (p, m))
SIMPLE(fchmod, MODE, inside_descriptor(d), (int d, mode_t m), (d, m))
