// archive.h: a file as the bits that a predictor is surprised by, and back.
//
// 32 bytes of head, then pieces, then the end. A piece is a stretch of the content, coded by itself
// (range_coder.h); piece i belongs to lane i % lanes. Each lane has a predictor of its own, which
// goes on from piece to piece, so lanes run side by side, and no more is held in memory than one
// piece of each.
//   head   "FZT2", mix, lanes, 0, 0, bytes of a piece (4), model (8), priming text (8),
//          checksum of these (4)
//   piece  bytes of content (4), bytes of code (4), code
//   end    0 (4), checksum of the content (8)
// Numbers have their lowest byte first. Model and text are named by their checksums; 0: without.
#ifndef ARCHIVE_H
#define ARCHIVE_H

#include <stdio.h>

#include "support/predictor.h"

enum { MAX_LANES = 64, PIECE = 1 << 18 };

typedef struct {
    MixKind mix;
    int lanes;
    uint32_t piece;
    uint64_t model, text;
} ArchiveHead;

// Shown every piece: bytes of content so far.
typedef void (*ArchiveProgress)(uint64_t done);

// All of `in` into `out`, whose write errors are for the caller to find. Returns the number of
// bytes, or -1: `in` cannot be read. name: of `in`, for messages.
int64_t archive_write(const ArchiveHead *head, Predictor *lanes, FILE *in, const char *name,
                      FILE *out, ArchiveProgress progress, Error *e);
// What the archive wants; -1 if it is none, of an earlier version, or damaged.
int archive_read_head(ArchiveHead *head, FILE *in, const char *name, Error *e);
// The rest of it, to `out`. -1 where it is damaged.
int64_t archive_read(const ArchiveHead *head, Predictor *lanes, FILE *in, const char *name,
                     FILE *out, ArchiveProgress progress, Error *e);

#endif
