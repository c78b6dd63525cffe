/* Stands between a process and its disk (LD_PRELOAD): counts the system calls that change a watched folder, and lets
   something happen at the k-th of them. Built and driven by syscall_jobs.py, which says what a power cut then leaves.

   disk_arm(folder, k, how, journal)   start to count; k = 0: only count
       how 0   SIGKILL before the call       1   the same, but half of a write was done
       how 2   the call fails with EIO       3   SIGKILL behind the call
   disk_count()                        calls so far
   Each call that succeeded is a line in the journal, written behind it with one write:
       C path (a new file)   D path (a new folder)   W path (bytes)   S path (fsync, of a file or of a folder)
       R old TAB new         U path (a name that went)                T path (truncated, or made longer)
   What another rank was killed in the middle of is not in the journal: then it did happen, as far as the disk knows. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long at, count;
static int how, journal = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void disk_arm(const char *folder, long k, int what, const char *path) {
    count = 0;
    at = k;
    how = what;
    journal = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    root_length = strlen(folder);
    strcpy(root, folder);
}

long disk_count(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }

static int inside(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = root_length ? readlink(link, path, PATH_MAX - 1) : -1;
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && inside(path);
}

static int of_name(int folder, const char *name, char *path) {
    path[0] = 0;
    if (!root_length || !name) return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char where[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (!getcwd(where, sizeof where)) return 0;
        } else {
            of_descriptor(folder, where);
        }
        if (snprintf(path, PATH_MAX, "%s/%s", where, name) >= PATH_MAX) return 0;
    }
    return inside(path);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static long mine;
/* Counts a call; 1 when it is the k-th. */
static int is_it(void) { return (mine = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST)) == at && at; }

/* Returns 1 when the call is to fail; does not return when the process is to die before it. */
static int before(int *last) {
    *last = 0;
    if (!is_it()) return 0;
    if (how == 0 || how == 1) die();
    if (how == 2) {
        errno = EIO;
        return 1;
    }
    *last = 1;
    return 0;
}

static void after(int last, char kind, const char *path, const char *second) {
    int saved = errno;
    char line[2 * PATH_MAX + 8];
    int n = snprintf(line, sizeof line, second ? "%c %s\t%s\n" : "%c %s\n", kind, path, second);
    syscall(SYS_write, journal, line, n);
    if (last) die();
    errno = saved;
}

static ssize_t write_as(int fd, const void *data, size_t size, off_t offset, int placed) {
    char path[PATH_MAX];
    int last = 0;
    if (!of_descriptor(fd, path)) return placed ? REAL(pwrite)(fd, data, size, offset) : REAL(write)(fd, data, size);
    if (how == 1 && __atomic_load_n(&count, __ATOMIC_SEQ_CST) + 1 == at) {
        size_t half = size / 2;
        if (placed) REAL(pwrite)(fd, data, half, offset); else REAL(write)(fd, data, half);
        after(0, 'W', path, 0);
    }
    if (before(&last)) return -1;
    ssize_t done = placed ? REAL(pwrite)(fd, data, size, offset) : REAL(write)(fd, data, size);
    if (done >= 0) after(last, 'W', path, 0);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) { return write_as(fd, data, size, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_as(fd, data, size, offset, 1); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return write_as(fd, data, size, offset, 1); }

#define ON_DESCRIPTOR(name, kind, parameters, arguments)                    \
    int name parameters {                                                   \
        char path[PATH_MAX];                                                \
        int last = 0;                                                       \
        if (!of_descriptor(fd, path)) return REAL(name) arguments;          \
        if (before(&last)) return -1;                                       \
        int result = REAL(name) arguments;                                  \
        if (!result) after(last, kind, path, 0);                            \
        return result;                                                      \
    }
ON_DESCRIPTOR(fsync, 'S', (int fd), (fd))
ON_DESCRIPTOR(fdatasync, 'S', (int fd), (fd))
ON_DESCRIPTOR(ftruncate, 'T', (int fd, off_t size), (fd, size))
ON_DESCRIPTOR(ftruncate64, 'T', (int fd, off64_t size), (fd, size))

#define ON_NAME(name, kind, folder, file, parameters, arguments)            \
    int name parameters {                                                   \
        char path[PATH_MAX];                                                \
        int last = 0;                                                       \
        if (!of_name(folder, file, path)) return REAL(name) arguments;      \
        if (before(&last)) return -1;                                       \
        int result = REAL(name) arguments;                                  \
        if (!result) after(last, kind, path, 0);                            \
        return result;                                                      \
    }
ON_NAME(mkdir, 'D', AT_FDCWD, file, (const char *file, mode_t mode), (file, mode))
ON_NAME(mkdirat, 'D', fd, file, (int fd, const char *file, mode_t mode), (fd, file, mode))
ON_NAME(unlink, 'U', AT_FDCWD, file, (const char *file), (file))
ON_NAME(rmdir, 'U', AT_FDCWD, file, (const char *file), (file))
ON_NAME(unlinkat, 'U', fd, file, (int fd, const char *file, int flags), (fd, file, flags))

#define ON_TWO(name, first, second, parameters, arguments)                              \
    int name parameters {                                                               \
        char old[PATH_MAX], new[PATH_MAX];                                              \
        int last = 0, there = of_name(first, from, old);                                \
        if (!of_name(second, to, new) && !there) return REAL(name) arguments;           \
        if (before(&last)) return -1;                                                   \
        int result = REAL(name) arguments;                                              \
        if (!result) after(last, 'R', old, new);                                        \
        return result;                                                                  \
    }
ON_TWO(rename, AT_FDCWD, AT_FDCWD, (const char *from, const char *to), (from, to))
ON_TWO(renameat, a, b, (int a, const char *from, int b, const char *to), (a, from, b, to))
ON_TWO(renameat2, a, b, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))

/* Opening counts where it makes a new file, or cuts one to nothing. */
static int opened(int folder, const char *file, int flags, mode_t mode) {
    char path[PATH_MAX];
    int last = 0, created = (flags & O_CREAT) && of_name(folder, file, path) && faccessat(folder, file, F_OK, AT_SYMLINK_NOFOLLOW);
    int cut = !created && (flags & O_TRUNC) && of_name(folder, file, path);
    if ((created || cut) && before(&last)) return -1;
    int fd = syscall(SYS_openat, folder, file, flags | O_LARGEFILE, mode);
    if ((created || cut) && fd >= 0) after(last, created ? 'C' : 'T', path, 0);
    return fd;
}

#define MODE                                           \
    mode_t mode = 0;                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {               \
        va_list more;                                  \
        va_start(more, flags);                         \
        mode = va_arg(more, mode_t);                   \
        va_end(more);                                  \
    }
int open(const char *file, int flags, ...) { MODE return opened(AT_FDCWD, file, flags, mode); }
int open64(const char *file, int flags, ...) { MODE return opened(AT_FDCWD, file, flags, mode); }
int openat(int folder, const char *file, int flags, ...) { MODE return opened(folder, file, flags, mode); }
int openat64(int folder, const char *file, int flags, ...) { MODE return opened(folder, file, flags, mode); }
