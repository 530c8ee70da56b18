// output.c: an output is written under a temporary name and renamed. Read output.h first.
#define _XOPEN_SOURCE 700  // realpath, which POSIX.1-2008 alone does not show
#define _FILE_OFFSET_BITS 64
#include "support/output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// FNV-1a: xor a byte, multiply by the 64-bit FNV prime, 2^40 + 2^8 + 0xb3.
uint64_t checksum_add(uint64_t hash, const void *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

// ---- Files that are whole or not there ----------------------------------------------------------

bool output_is_standard(const char *path) {
    return strcmp(path, "-") == 0 || strcmp(path, "/dev/stdout") == 0;
}

int output_differs(const char *path, const char *in, Error *e) {
    struct stat a, b;
    bool standard = strcmp(in, "-") == 0;
    if (output_is_standard(path) ? fstat(1, &a) : stat(path, &a)) return 0;
    if (standard ? fstat(0, &b) : stat(in, &b)) return 0;
    // Of files alone: a terminal is often both.
    if (!S_ISREG(a.st_mode) || a.st_dev != b.st_dev || a.st_ino != b.st_ino) return 0;
    return fail(e, "%.200s is the same file as the input %.200s: choose another output", path,
                standard ? "(standard input)" : in);
}

bool output_is_temporary(const char *name, const char *of) {
    static const char digits[] = "0123456789";
    size_t n = strlen(of);
    if (strncmp(name, of, n) != 0 || name[n] != '.') return false;
    const char *pid = name + n + 1, *minus = pid + strspn(pid, digits);
    if (minus == pid || *minus != '-') return false;
    const char *end = minus + 1 + strspn(minus + 1, digits);
    return end > minus + 1 && strcmp(end, ".tmp") == 0;
}

// How much of the path begins a temporary name: file systems take names of 255 bytes, and some of
// them no part of a UTF-8 character.
static size_t stem(const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t n = strlen(name);
    if (n > 200)
        for (n = 200; n > 1 && ((uint8_t)name[n] & 0xc0) == 0x80;) n--;
    return (size_t)(name - path) + n;
}

// Creates the file under a name that nothing had: what is there already is somebody else's.
static FILE *create_unique(Output *out, size_t size, Error *e) {
    char *name = malloc(size);
    int fd = -1, n = (int)stem(out->path);
    if (!name) return fail(e, "out of memory"), NULL;
    errno = EEXIST;
    for (int i = 0; i < 10000 && fd < 0 && errno == EEXIST; i++) {
        snprintf(name, size, "%.*s.%ld-%d.tmp", n, out->path, (long)getpid(), i);
        fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0666);
    }
    if (fd < 0) {
        fail(e, "cannot write %.200s: %s", name, strerror(errno));
        free(name);
        return NULL;
    }
    out->temporary = name;  // not before it is ours: a signal handler may remove it
    FILE *f = fdopen(fd, "w+b");
    if (!f) fail(e, "cannot write %.200s: %s", name, strerror(errno));
    return f;
}

int output_open(Output *out, const char *path, bool replace, Error *e) {
    *out = (Output){0};
    if (output_is_standard(path)) {
        out->file = tmpfile();
        return out->file ? 0 : fail(e, "cannot collect the output in a temporary file: %s",
                                    strerror(errno));
    }
    struct stat st, target;
    // lstat, because a link that points nowhere is there, too.
    bool there = lstat(path, &st) == 0, link = there && S_ISLNK(st.st_mode);
    if (link && stat(path, &target))
        return fail(e, "%.200s is a link that leads nowhere: %s", path, strerror(errno));
    if (link) st = target;
    if (there && S_ISDIR(st.st_mode))
        return fail(e, "%.200s is a directory, expected a file", path);
    if (there && !S_ISREG(st.st_mode))
        return fail(e, "%.200s is a device, a pipe or a socket, expected a file (- is standard "
                       "output)", path);
    if (there && !replace)
        return fail(e, "%.200s exists: choose another name, or overwrite it with --force", path);
    // The name of what a link leads to: a rename would replace the link itself.
    out->path = link ? realpath(path, NULL) : strdup(path);
    if (!out->path) return fail(e, "cannot write %.200s: %s", path, strerror(errno));
    // "." and "-" and two numbers and ".tmp" and a NUL
    out->file = create_unique(out, strlen(out->path) + 48, e);
    if (!out->file) return output_abandon(out), -1;
    // What was kept from others stays so. Some file systems have no modes: no error.
    if (there) fchmod(fileno(out->file), st.st_mode & 07777);
    return 0;
}

void output_abandon(Output *out) {
    if (out->file) fclose(out->file);
    if (out->temporary) unlink(out->temporary);
    free(out->path);
    free(out->temporary);
    *out = (Output){0};
}

// A rename is on disk only when its folder is. Some file systems cannot sync a folder: no error.
static void sync_folder(const char *path) {
    const char *slash = strrchr(path, '/');
    char *folder = slash ? strdup(path) : strdup(".");
    if (!folder) return;
    if (slash) folder[slash == path ? 1 : slash - path] = 0;
    int fd = open(folder, O_RDONLY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(folder);
}

int output_failed(const Output *out, int reason, Error *e) {
    return fail(e, "cannot write %.200s: %s%s", out->path ? out->path : "to standard output",
                reason ? strerror(reason) : "the disk is full or failing",
                out->path ? "; what was there is untouched" : "");
}

// What was collected goes to standard output. A reader that has gone (| head) is content: no error.
static int commit_standard(Output *out, Error *e) {
    char piece[1 << 14];
    size_t n;
    bool ok = !ferror(out->file) && fflush(out->file) == 0 && fseek(out->file, 0, SEEK_SET) == 0;
    while (ok && (n = fread(piece, 1, sizeof piece, out->file)) > 0)
        ok = fwrite(piece, 1, n, stdout) == n;
    ok = ok && !ferror(out->file) && fflush(stdout) == 0;
    bool gone = !ok && errno == EPIPE;
    if (gone) clearerr(stdout);  // or whoever flushes it next would see a failure
    int status = ok || gone ? 0 : output_failed(out, errno, e);
    output_abandon(out);
    return status;
}

int output_commit(Output *out, Error *e) {
    errno = 0;
    if (!out->path) return commit_standard(out, e);
    // In this order: bytes on disk, then the name. A name that came first could stand for an empty
    // file after a crash.
    bool ok = !ferror(out->file) && fflush(out->file) == 0 && fsync(fileno(out->file)) == 0;
    int reason = errno;
    // Some file systems say only here that the disk is full.
    bool closed = fclose(out->file) == 0;
    out->file = NULL;
    if (ok && !closed) reason = errno;
    ok = ok && closed;
    if (ok && rename(out->temporary, out->path) != 0) {
        reason = errno;
        ok = false;
    }
    if (ok) {
        char *gone = out->temporary;  // NULL before it is freed: a signal handler may look
        out->temporary = NULL;
        free(gone);
        sync_folder(out->path);
    } else {
        output_failed(out, reason, e);
    }
    output_abandon(out);
    return ok ? 0 : -1;
}
