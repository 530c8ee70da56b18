// output.c: an output is written under a temporary name and renamed. Read output.h first.
#define _POSIX_C_SOURCE 200809L
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

int output_open(Output *out, const char *path, bool replace, Error *e) {
    *out = (Output){0};
    struct stat st;
    // lstat, because a link that points nowhere is there, too, and the rename would replace it.
    bool there = lstat(path, &st) == 0;
    if (there && S_ISDIR(st.st_mode))
        return fail(e, "%.200s is a directory, expected a file", path);
    if (there && !replace)
        return fail(e, "%.200s exists: choose another name, or overwrite it with --force", path);
    size_t n = strlen(path);
    out->path = malloc(n + 1);
    // ".tmp" and its NUL
    out->temporary = malloc(n + 5);
    if (!out->path || !out->temporary) {
        output_abandon(out);
        return fail(e, "out of memory");
    }
    memcpy(out->path, path, n + 1);
    snprintf(out->temporary, n + 5, "%s.tmp", path);
    out->file = fopen(out->temporary, "w+b");
    if (out->file) return 0;
    fail(e, "cannot write %.200s: %s", out->temporary, strerror(errno));
    free(out->temporary);  // not ours to remove
    out->temporary = NULL;
    output_abandon(out);
    return -1;
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
    return fail(e, "cannot write %.200s: %s; what was there is untouched", out->path,
                reason ? strerror(reason) : "the disk is full or failing");
}

int output_commit(Output *out, Error *e) {
    errno = 0;
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
