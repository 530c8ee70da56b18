// output.h: files that are whole or not there, and the checksum that finds damage.
#ifndef OUTPUT_H
#define OUTPUT_H

#include <stdio.h>

#include "support/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// An output under a temporary name of its own, PATH.PID-N.tmp, in the folder of the file. SIGKILL
// at any moment leaves the file of before or the new one, and perhaps the temporary one beside it.
// Where PATH is a link to a file, the link stays and the file gets the new content. A file that is
// there keeps its mode. A long name is cut before PID.
typedef struct {
    FILE *file;              // to be written and sought by its owner
    char *path, *temporary;  // path NULL: standard output. temporary NULL: not there (any more)
} Output;

// "-" and "/dev/stdout".
bool output_is_standard(const char *path);
// Refuses an output that is one of the program's own inputs, also by another name or link: -1.
// "-" as `in` is standard input.
int output_differs(const char *path, const char *in, Error *e);
// Begins an output. Without `replace` a path that exists is refused; a folder, a device or a pipe
// always is. Standard output is written by output_commit, so that it is whole or empty, too.
int output_open(Output *out, const char *path, bool replace, Error *e);
// Flush, fsync, rename over the path, fsync the folder. On failure (a full disk) the temporary file
// is removed and what was at the path stays as it was. Either way `out` is closed.
int output_commit(Output *out, Error *e);
// Says that a write failed. reason: an errno, or 0 when stdio has seen an error earlier.
int output_failed(const Output *out, int reason, Error *e);
// Whether `name` can be the temporary file of an output `of`, both without folder.
bool output_is_temporary(const char *name, const char *of);
// Gives up: removes the temporary file. Takes a zeroed Output, and one that is closed already.
void output_abandon(Output *out);

// FNV-1a, 64 bits, over one piece after another, from CHECKSUM_START: for damage, not for malice.
#define CHECKSUM_START 0xcbf29ce484222325u
uint64_t checksum_add(uint64_t hash, const void *bytes, size_t n);

#ifdef __cplusplus
}
#endif
#endif
