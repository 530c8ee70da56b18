// archive.c: compressed files. Read archive.h first.
#include "support/archive.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "support/output.h"
#include "support/range_coder.h"

enum { HEAD = 32 };

// The code of a piece: a bit costs at most 16, and a little where the coder cuts its interval off.
static size_t code_room(size_t n) { return 17 * n + 64; }

typedef struct {
    uint8_t *content, *code;
    size_t n, n_code;
    bool sound;
} Piece;

static void put_number(uint8_t *to, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) to[i] = (uint8_t)(x >> (8 * i));
}
static uint64_t get_number(const uint8_t *from, int bytes) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++) x |= (uint64_t)from[i] << (8 * i);
    return x;
}
static void write_number(FILE *out, uint64_t x, int bytes) {
    uint8_t b[8];
    put_number(b, x, bytes);
    fwrite(b, 1, (size_t)bytes, out);
}

static uint32_t head_sum(const uint8_t *head) {
    uint64_t hash = checksum_add(CHECKSUM_START, head, HEAD - 4);
    return (uint32_t)(hash ^ hash >> 32);
}

// One piece for each lane, their memory in one; free() of pieces[0].content and of it.
static Piece *new_pieces(const ArchiveHead *h, Error *e) {
    size_t each = h->piece + code_room(h->piece);
    Piece *pieces = calloc((size_t)h->lanes, sizeof *pieces);
    uint8_t *space = pieces ? malloc((size_t)h->lanes * each) : NULL;
    for (int i = 0; space && i < h->lanes; i++) {
        // All contents first: they are read in one.
        pieces[i].content = space + (size_t)i * h->piece;
        pieces[i].code = space + (size_t)h->lanes * h->piece + (size_t)i * code_room(h->piece);
    }
    if (space) return pieces;
    free(pieces);
    fail(e, "out of memory for %d blocks of %u bytes", h->lanes, h->piece);
    return NULL;
}

static void free_pieces(Piece *pieces) {
    free(pieces[0].content);
    free(pieces);
}

static void encode_piece(Predictor *p, Piece *q) {
    Coder c = encoder(q->code, code_room(q->n));
    for (size_t i = 0; i < q->n; i++)
        for (int k = 7; k >= 0; k--) {
            int bit = q->content[i] >> k & 1;
            encode_bit(&c, predictor_bit(p), bit);
            predictor_tell(p, bit);
        }
    if (q->n) encode_end(&c);
    q->n_code = (size_t)(c.at - q->code);
    q->sound = !c.over;
}

static void decode_piece(Predictor *p, Piece *q) {
    if (q->n == 0) return;
    Coder c = decoder(q->code, q->n_code);
    for (size_t i = 0; i < q->n && !c.over; i++) {
        int byte = 0;
        for (int k = 0; k < 8; k++) {
            int bit = decode_bit(&c, predictor_bit(p));
            predictor_tell(p, bit);
            byte = 2 * byte | bit;
        }
        q->content[i] = (uint8_t)byte;
    }
    q->sound = decode_ended(&c);
}

int64_t archive_write(const ArchiveHead *h, Predictor *lanes, FILE *in, const char *name,
                      FILE *out, ArchiveProgress progress, Error *e) {
    uint8_t head[HEAD] = {'F', 'Z', 'T', '2', (uint8_t)h->mix, (uint8_t)h->lanes};
    uint64_t done = 0, sum = CHECKSUM_START;
    bool sound = true, more = true;
    Piece *pieces = new_pieces(h, e);
    if (!pieces) return -1;
    put_number(head + 8, h->piece, 4);
    put_number(head + 12, h->model, 8);
    put_number(head + 20, h->text, 8);
    put_number(head + 28, head_sum(head), 4);
    fwrite(head, 1, HEAD, out);
    while (more && sound && !ferror(out)) {
        size_t most = (size_t)h->lanes * h->piece, n = fread(pieces[0].content, 1, most, in);
        more = n == most;
        sum = checksum_add(sum, pieces[0].content, n);
        for (int i = 0; i < h->lanes; i++) {
            size_t left = (size_t)i * h->piece < n ? n - (size_t)i * h->piece : 0;
            pieces[i].n = left < h->piece ? left : h->piece;
        }
#pragma omp parallel for schedule(static, 1) if (h->lanes > 1)
        for (int i = 0; i < h->lanes; i++) encode_piece(&lanes[i], &pieces[i]);
        for (int i = 0; i < h->lanes && pieces[i].n; i++) {
            sound = sound && pieces[i].sound;
            write_number(out, pieces[i].n, 4);
            write_number(out, pieces[i].n_code, 4);
            fwrite(pieces[i].code, 1, pieces[i].n_code, out);
        }
        progress(done += n);
    }
    write_number(out, 0, 4);
    write_number(out, sum, 8);
    free_pieces(pieces);
    if (ferror(in)) return fail(e, "cannot read %.200s: %s", name, strerror(errno));
    return sound ? (int64_t)done : fail(e, "%.200s has no code that fits: try --mix cm", name);
}

int archive_read_head(ArchiveHead *h, FILE *in, const char *name, Error *e) {
    uint8_t head[HEAD];
    size_t n = fread(head, 1, HEAD, in);
    if (ferror(in)) return fail(e, "cannot read %.200s: %s", name, strerror(errno));
    if (n >= 4 && memcmp(head, "FZT1", 4) == 0)
        return fail(e, "%.200s is an archive of an earlier version (FZT1, this one reads FZT2): "
                       "decompress it with the program that made it", name);
    if (n < 4 || memcmp(head, "FZT2", 4))
        return fail(e, "%.200s was not made by sample --compress", name);
    if (n < HEAD) return fail(e, "%.200s is cut off: %zu bytes long", name, n);
    *h = (ArchiveHead){.mix = (MixKind)head[4], .lanes = head[5],
                       .piece = (uint32_t)get_number(head + 8, 4),
                       .model = get_number(head + 12, 8), .text = get_number(head + 20, 8)};
    if (get_number(head + 28, 4) != head_sum(head) || head[4] > MIX_CM || h->lanes < 1 ||
        h->lanes > MAX_LANES || h->piece < 1 || h->piece > PIECE)
        return fail(e, "%.200s is damaged: the checksum of its header is wrong", name);
    return 0;
}

// The next piece; its n stays 0 at the end. Why not, or NULL.
static const char *read_piece(const ArchiveHead *h, Piece *q, FILE *in) {
    static const char cut_off[] = "it is cut off";
    uint8_t b[4];
    if (fread(b, 1, 4, in) != 4) return cut_off;
    size_t n = (size_t)get_number(b, 4);
    if (n == 0) return NULL;
    if (n > h->piece) return "its pieces are too long";
    if (fread(b, 1, 4, in) != 4) return cut_off;
    q->n_code = (size_t)get_number(b, 4);
    if (q->n_code > code_room(n)) return "its pieces are too long";
    if (fread(q->code, 1, q->n_code, in) != q->n_code) return cut_off;
    q->n = n;
    return NULL;
}

// Pieces of all lanes up to the end, which sets *ended.
static const char *read_round(const ArchiveHead *h, Piece *pieces, FILE *in, bool *ended) {
    const char *fault = NULL;
    for (int i = 0; i < h->lanes; i++) pieces[i].n = 0, pieces[i].sound = true;
    for (int i = 0; i < h->lanes && !fault && !*ended; i++) {
        fault = read_piece(h, &pieces[i], in);
        *ended = pieces[i].n == 0;
    }
    return fault;
}

int64_t archive_read(const ArchiveHead *h, Predictor *lanes, FILE *in, const char *name,
                     FILE *out, ArchiveProgress progress, Error *e) {
    uint64_t done = 0, sum = CHECKSUM_START;
    const char *fault = NULL;
    bool ended = false;
    uint8_t b[8];
    Piece *pieces = new_pieces(h, e);
    if (!pieces) return -1;
    while (!ended && !fault && !ferror(out)) {
        fault = read_round(h, pieces, in, &ended);
#pragma omp parallel for schedule(static, 1) if (h->lanes > 1)
        for (int i = 0; i < h->lanes; i++) decode_piece(&lanes[i], &pieces[i]);
        for (int i = 0; i < h->lanes && !fault; i++) {
            if (!pieces[i].sound) {
                fault = "its code leads nowhere";
                break;
            }
            sum = checksum_add(sum, pieces[i].content, pieces[i].n);
            fwrite(pieces[i].content, 1, pieces[i].n, out);
            done += pieces[i].n;
        }
        progress(done);
    }
    free_pieces(pieces);
    if (ferror(in)) return fail(e, "cannot read %.200s: %s", name, strerror(errno));
    if (ferror(out)) return (int64_t)done;
    if (!fault && fread(b, 1, 8, in) != 8) fault = "it is cut off";
    if (!fault && get_number(b, 8) != sum) fault = "the checksum of the content is wrong";
    if (!fault && fgetc(in) != EOF) fault = "something follows its end";
    return fault ? fail(e, "%.200s is damaged: %s", name, fault) : (int64_t)done;
}
