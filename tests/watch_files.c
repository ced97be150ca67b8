/* Counts what a process does to the files of one folder, writes it down, and kills the process at a given operation.

   Loaded by LD_PRELOAD, so that it sees Python's files, the Rust of safetensors and tokenizers, the C++ of torch.save.
   tests/test_kills.py compiles it; watch() starts it. One line an operation: name, path, new path, inode, by tabs.
   One thing escapes: safetensors renames a file in the folder where it wrote it, by a bare system call. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static int record = -1;
static long kill_at;
static long num_operations;

/* Operations on files below `path` are counted from 1 and written to `file`, unless that is negative. The process dies
   before the operation `number`, or after the operation -`number` if it is negative; 0: never. */
void watch(const char *path, int file, long number) {
    record = file;
    kill_at = number;
    num_operations = 0;
    strncpy(folder, path, sizeof folder - 1);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
}

static void absolute(int directory, const char *path, char *full) {
    char start[4096] = "";
    if (path[0] == '/') {
        snprintf(full, 8192, "%s", path);
        return;
    }
    if (directory != AT_FDCWD)
        path_of(directory, start);
    else if (!getcwd(start, sizeof start))
        start[0] = 0;
    snprintf(full, 8192, "%s/%s", start, path);
}

static int is_watched(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* Returns the number of the operation, or 0 if it is none of ours. */
static long before(const char *name, const char *path, const char *new_path, unsigned long inode) {
    if (!is_watched(path) && !is_watched(new_path)) return 0;
    long number = __atomic_add_fetch(&num_operations, 1, __ATOMIC_SEQ_CST);
    if (number == kill_at) die();
    if (record >= 0) {
        char line[20000];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%lu\n", name, path, new_path, inode);
        syscall(SYS_write, record, line, length);
    }
    return number;
}

static void after(long number) {
    if (number && number == -kill_at) die();
}

static long before_at(const char *name, int directory, const char *path) {
    char full[8192];
    absolute(directory, path, full);
    return before(name, full, "", 0);
}

static long before_file(const char *name, int descriptor) {
    if (!folder[0] || descriptor == record) return 0;
    char path[4096];
    struct stat status;
    path_of(descriptor, path);
    if (fstat(descriptor, &status)) return 0;
    return before(name, path, "", status.st_ino);
}

#define NEXT(name) __typeof__(name) *next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define DO(noted, call)          \
    long number = noted;         \
    __typeof__(call) result = call; \
    after(number);               \
    return result

static long before_open(int directory, const char *path, int flags) {
    if (!(flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))) return 0;
    return before_at("open", directory, path);
}

#define MODE                         \
    va_list more;                    \
    va_start(more, flags);           \
    mode_t mode = va_arg(more, mode_t); \
    va_end(more)

int open(const char *path, int flags, ...) {
    NEXT(open);
    MODE;
    DO(before_open(AT_FDCWD, path, flags), next(path, flags, mode));
}

int open64(const char *path, int flags, ...) {
    NEXT(open64);
    MODE;
    DO(before_open(AT_FDCWD, path, flags), next(path, flags, mode));
}

int openat(int directory, const char *path, int flags, ...) {
    NEXT(openat);
    MODE;
    DO(before_open(directory, path, flags), next(directory, path, flags, mode));
}

int openat64(int directory, const char *path, int flags, ...) {
    NEXT(openat64);
    MODE;
    DO(before_open(directory, path, flags), next(directory, path, flags, mode));
}

static long before_fopen(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") ? before_at("open", AT_FDCWD, path) : 0;
}

FILE *fopen(const char *path, const char *mode) {
    NEXT(fopen);
    DO(before_fopen(path, mode), next(path, mode));
}

FILE *fopen64(const char *path, const char *mode) {
    NEXT(fopen64);
    DO(before_fopen(path, mode), next(path, mode));
}

ssize_t write(int file, const void *bytes, size_t size) {
    NEXT(write);
    DO(before_file("write", file), next(file, bytes, size));
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    NEXT(writev);
    DO(before_file("write", file), next(file, parts, count));
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t place) {
    NEXT(pwrite);
    DO(before_file("write", file), next(file, bytes, size, place));
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t place) {
    NEXT(pwrite64);
    DO(before_file("write", file), next(file, bytes, size, place));
}

ssize_t sendfile(int file, int from, off_t *place, size_t size) {
    ssize_t (*next)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
    DO(before_file("write", file), next(file, from, place, size));
}

ssize_t sendfile64(int file, int from, off64_t *place, size_t size) {
    ssize_t (*next)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
    DO(before_file("write", file), next(file, from, place, size));
}

ssize_t copy_file_range(int from, off64_t *from_place, int file, off64_t *place, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    DO(before_file("write", file), next(from, from_place, file, place, size, flags));
}

int ftruncate(int file, off_t size) {
    NEXT(ftruncate);
    DO(before_file("write", file), next(file, size));
}

int ftruncate64(int file, off64_t size) {
    NEXT(ftruncate64);
    DO(before_file("write", file), next(file, size));
}

int fsync(int file) {
    NEXT(fsync);
    DO(before_file("fsync", file), next(file));
}

int fdatasync(int file) {
    NEXT(fdatasync);
    DO(before_file("fsync", file), next(file));
}

static long before_rename(int directory, const char *path, int new_directory, const char *new_path) {
    char full[8192], new_full[8192];
    absolute(directory, path, full);
    absolute(new_directory, new_path, new_full);
    return before("rename", full, new_full, 0);
}

int rename(const char *path, const char *new_path) {
    NEXT(rename);
    DO(before_rename(AT_FDCWD, path, AT_FDCWD, new_path), next(path, new_path));
}

int renameat(int directory, const char *path, int new_directory, const char *new_path) {
    NEXT(renameat);
    DO(before_rename(directory, path, new_directory, new_path), next(directory, path, new_directory, new_path));
}

int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    DO(before_at("mkdir", AT_FDCWD, path), next(path, mode));
}

int mkdirat(int directory, const char *path, mode_t mode) {
    NEXT(mkdirat);
    DO(before_at("mkdir", directory, path), next(directory, path, mode));
}

int unlink(const char *path) {
    NEXT(unlink);
    DO(before_at("unlink", AT_FDCWD, path), next(path));
}

int rmdir(const char *path) {
    NEXT(rmdir);
    DO(before_at("rmdir", AT_FDCWD, path), next(path));
}

int unlinkat(int directory, const char *path, int flags) {
    NEXT(unlinkat);
    DO(before_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, path), next(directory, path, flags));
}
