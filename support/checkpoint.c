// checkpoint.c: safetensors files, written whole and read with suspicion. The one place of the
// project where bytes that somebody else may have made are taken apart.
//
//   8 bytes N, little-endian | N bytes of JSON, padded with spaces | float32 data without gaps
//   {"__metadata__":{"format":"pt",...},"head.bias":{"dtype":"F32","shape":[256],
//                                                     "data_offsets":[0,1024]},...}
//
// Refuses whatever is not exactly that and names the fault; never asserts, never crashes. Read
// checkpoint.h first. Run:  make fuzz (libFuzzer on checkpoint_parse)      ./test_sample (replay)
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "support/checkpoint.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum {
    MAX_HEADER = 100 << 20,  // the safetensors library's own bound, roughly
    MAX_NAME = 127,          // bytes of a tensor's name or a key
    MAX_VALUE = 1 << 16,     // bytes of a metadata value
    CHUNK = 4096,            // floats converted at a time
    CHECKSUM_DIGITS = 16,
};
static const char version[] = "2";

// ---- What both directions share: the configuration as text, and the layout ----------------------

enum { CHANNELS, LATENT, ACTIVATION, UNITS, TIE, SOFTCAP, WINDOW, SKIPS, NORM_IN, NORM_OUT, BIAS,
       CONFIG_KEYS };
// Where a file says nothing of a key it was made before there was one; NULL: it must.
static const struct {
    const char *name, *fallback;
} config_keys[CONFIG_KEYS] = {
    {"channels", NULL}, {"latent", NULL}, {"activation", NULL}, {"units", NULL}, {"tie", NULL},
    {"softcap", NULL}, {"window", NULL}, {"skips", "0"}, {"norm_in", "yes"}, {"norm_out", "yes"},
    {"bias", "yes"},
};
typedef struct {
    char s[UNITS_TEXT];
} ConfigText;

// One value of the configuration as the metadata has it.
static ConfigText config_text(const Config *c, int key) {
    ConfigText t = {""};
    if (key == CHANNELS) snprintf(t.s, sizeof t.s, "%d", c->channels);
    if (key == LATENT) snprintf(t.s, sizeof t.s, "%d", c->latent);
    if (key == ACTIVATION) snprintf(t.s, sizeof t.s, "%s", activation_names[c->activation]);
    if (key == UNITS) snprintf(t.s, sizeof t.s, "%s", c->units);
    if (key == TIE) snprintf(t.s, sizeof t.s, "%s", c->tie ? "yes" : "no");
    if (key == NORM_IN) snprintf(t.s, sizeof t.s, "%s", c->no_norm_in ? "no" : "yes");
    if (key == NORM_OUT) snprintf(t.s, sizeof t.s, "%s", c->no_norm_out ? "no" : "yes");
    if (key == BIAS) snprintf(t.s, sizeof t.s, "%s", c->no_bias ? "no" : "yes");
    if (key == WINDOW) snprintf(t.s, sizeof t.s, "%d", c->window);
    if (key == SKIPS) snprintf(t.s, sizeof t.s, "%d", c->skips);
    // Nine digits name every float.
    if (key == SOFTCAP) snprintf(t.s, sizeof t.s, "%.9g", (double)c->softcap);
    return t;
}

// The inverse. What it takes must come out again as the same text, so " 7" or "007" is refused.
static bool config_from_text(Config *c, int key, const char *text) {
    if (strlen(text) >= UNITS_TEXT) return false;
    if (key == CHANNELS || key == LATENT) {
        long x = strtol(text, NULL, 10);
        if (x < 0 || x > MAX_CHANNELS) return false;
        *(key == CHANNELS ? &c->channels : &c->latent) = (int)x;
    }
    if (key == WINDOW) c->window = atoi(text);
    if (key == SKIPS) c->skips = atoi(text);
    if (key == ACTIVATION) c->activation = activation_of(text);
    if (key == ACTIVATION && c->activation == N_ACTIVATIONS) return false;
    if (key == UNITS) snprintf(c->units, sizeof c->units, "%s", text);
    // Anything else becomes a default, whose text is not this one: refused below.
    if (key == TIE) c->tie = strcmp(text, "yes") == 0;
    if (key == NORM_IN) c->no_norm_in = strcmp(text, "no") == 0;
    if (key == NORM_OUT) c->no_norm_out = strcmp(text, "no") == 0;
    if (key == BIAS) c->no_bias = strcmp(text, "no") == 0;
    if (key == SOFTCAP) c->softcap = strtof(text, NULL);
    return strcmp(config_text(c, key).s, text) == 0;
}

// A matrix (K,C,O) of ours is (O,C,K) in the file, the last tap being the current byte; a linear
// layer is one with K = 1. Tables to look up, (V,C), and vectors are the same in both.
static bool same_layout(const Tensor *t) {
    return t->ndim == 1 || t->table;
}

static void file_dims(const Tensor *t, uint64_t dims[3]) {
    for (int i = 0; i < t->ndim; i++)
        dims[i] = (uint64_t)t->dims[same_layout(t) ? i : t->ndim - 1 - i];
}

// Where value i in the file's order stands in ours.
static size_t our_index(const Tensor *t, size_t i) {
    if (same_layout(t)) return i;
    size_t K = t->ndim == 3 ? (size_t)t->dims[0] : 1;
    size_t C = (size_t)t->dims[t->ndim - 2], O = (size_t)t->dims[t->ndim - 1];
    // i = (o*C + c)*K + k in the file; ours has tap K-1-k there, k = 0 being the current byte
    size_t k = i % K, c = i / K % C, o = i / K / C;
    return ((K - 1 - k) * C + c) * O + o;
}

// role/tensor, or the tensor's name alone where the role is "". At most 15 + 1 + 100 bytes.
static void full_name(char name[MAX_NAME + 1], const char *role, const char *tensor) {
    snprintf(name, MAX_NAME + 1, "%.15s%s%.100s", role, *role ? "/" : "", tensor);
}

int utf8_length(const uint8_t *p, const uint8_t *end) {
    if (p[0] < 0x80) return 1;
    int n = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    // 80..BF continue a character, C0 and C1 would begin overlong ones, F5.. lie beyond U+10FFFF.
    if (p[0] < 0xC2 || p[0] > 0xF4 || end - p < n) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    // Overlong; surrogates, U+D800 to U+DFFF; overlong; beyond U+10FFFF.
    if (p[0] == 0xE0 && p[1] < 0xA0) return 0;
    if (p[0] == 0xED && p[1] > 0x9F) return 0;
    if (p[0] == 0xF0 && p[1] < 0x90) return 0;
    if (p[0] == 0xF4 && p[1] > 0x8F) return 0;
    return n;
}

// ---- Writing ------------------------------------------------------------------------------------

typedef struct {
    char *s;
    size_t n, room;
    bool failed;  // out of memory: checked once, at the end
} Text;

// Adds at most 511 bytes; more, or no memory, sets t->failed, and so t is not used.
static void append(Text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    char piece[512];
    int n = vsnprintf(piece, sizeof piece, format, args);
    va_end(args);
    if (t->n + (size_t)n + 1 > t->room) {
        size_t room = 2 * (t->room + sizeof piece);
        char *s = realloc(t->s, room);
        if (!s) t->failed = true;
        if (s) t->s = s;
        if (s) t->room = room;
    }
    if (t->failed || n < 0 || (size_t)n >= sizeof piece) {
        t->failed = true;
        return;
    }
    memcpy(t->s + t->n, piece, (size_t)n + 1);
    t->n += (size_t)n;
}

// A quoted JSON string. No piece is longer than 6 bytes, so a value may be of any length.
static void append_string(Text *t, const char *s) {
    const uint8_t *p = (const uint8_t *)s, *end = p + strlen(s);
    append(t, "\"");
    for (int n; p < end; p += n ? n : 1) {
        n = utf8_length(p, end);
        if (n == 0)
            append(t, "\xEF\xBF\xBD");  // U+FFFD, "replacement character"
        else if (*p == '"' || *p == '\\')
            append(t, "\\%c", *p);
        else if (*p < 0x20)
            append(t, "\\u%04x", *p);
        else
            append(t, "%.*s", n, (const char *)p);
    }
    append(t, "\"");
}

static void append_pair(Text *t, const char *key, const char *value) {
    append(t, ",");
    append_string(t, key);
    append(t, ":");
    append_string(t, value);
}

// One tensor of the file to be written.
typedef struct {
    char name[MAX_NAME + 1];
    const Tensor *tensor;
    const real *values;
} Item;

static int by_item_name(const void *a, const void *b) {
    return strcmp(((const Item *)a)->name, ((const Item *)b)->name);
}

// The JSON header, padded so that the data starts at a multiple of 8. *checksum_at: where in it
// the digits of the checksum stand, as zeros.
static Text make_header(const Model *m, const Role *roles, int n_roles, const Pair *pairs,
                        int n_pairs, const Item *items, size_t n_items, size_t *checksum_at) {
    Text t = {0};
    append(&t, "{\"__metadata__\":{\"format\":\"pt\",\"model\":\"fuzzytok\",\"version\":\"%s\"",
           version);
    append(&t, ",\"checksum\":\"");
    *checksum_at = t.n;
    append(&t, "%0*d\"", CHECKSUM_DIGITS, 0);
    for (int key = 0; key < CONFIG_KEYS; key++)
        append_pair(&t, config_keys[key].name, config_text(&m->config, key).s);
    // A model file's one role is "": it has no such entry.
    if (*roles[0].name) append(&t, ",\"roles\":\"");
    for (int i = 0; i < n_roles; i++) append(&t, i ? ",%s" : "%s", roles[i].name);
    if (*roles[0].name) append(&t, "\"");
    for (int i = 0; i < n_pairs; i++) append_pair(&t, pairs[i].key, pairs[i].value);
    append(&t, "}");
    uint64_t offset = 0;
    for (size_t i = 0; i < n_items; i++) {
        const Tensor *tensor = items[i].tensor;
        uint64_t dims[3], bytes = 4 * (uint64_t)tensor->size;
        file_dims(tensor, dims);
        append(&t, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", items[i].name);
        for (int d = 0; d < tensor->ndim; d++)
            append(&t, d ? ",%llu" : "%llu", (unsigned long long)dims[d]);
        append(&t, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)offset,
               (unsigned long long)(offset + bytes));
        offset += bytes;
    }
    append(&t, "}");
    // 8 bytes of length stand before the header: with it a multiple of 8, the data is aligned.
    while (t.n % 8 && !t.failed) append(&t, " ");
    return t;
}

// The values of one tensor in the file's order, float32, little-endian on any machine.
static int write_values(Output *out, const Item *item, uint64_t *hash, Error *e) {
    uint8_t bytes[4 * CHUNK];
    const Tensor *t = item->tensor;
    for (size_t i0 = 0; i0 < t->size; i0 += CHUNK) {
        size_t n = t->size - i0 < CHUNK ? t->size - i0 : CHUNK;
        for (size_t i = 0; i < n; i++) {
            float x = (float)item->values[t->offset + our_index(t, i0 + i)];
            // Infinity and NaN, also what is finite as a double and too large for a float.
            if (x - x != 0)
                return fail(e, "value %zu of %s is not finite: not saved", i0 + i, item->name);
            uint32_t bits;
            memcpy(&bits, &x, sizeof bits);
            for (int b = 0; b < 4; b++) bytes[4 * i + (size_t)b] = (uint8_t)(bits >> (8 * b));
        }
        *hash = checksum_add(*hash, bytes, 4 * n);
        if (fwrite(bytes, 4, n, out->file) != n) return output_failed(out, errno, e);
    }
    return 0;
}

// Length, header, data, and then the checksum of header and data into its place.
static int write_file(Output *out, const Text *header, size_t checksum_at, const Item *items,
                      size_t n_items, Error *e) {
    FILE *f = out->file;
    uint8_t length[8];
    for (int b = 0; b < 8; b++) length[b] = (uint8_t)((uint64_t)header->n >> (8 * b));
    // What fails here sets the stream's error, and output_commit refuses.
    fwrite(length, 1, sizeof length, f);
    fwrite(header->s, 1, header->n, f);
    uint64_t hash = checksum_add(CHECKSUM_START, header->s, header->n);
    for (size_t i = 0; i < n_items; i++)
        if (write_values(out, &items[i], &hash, e)) return -1;
    if (fseeko(f, (off_t)(sizeof length + checksum_at), SEEK_SET))  // writes what is buffered
        return output_failed(out, errno, e);
    fprintf(f, "%0*llx", CHECKSUM_DIGITS, (unsigned long long)hash);
    return 0;
}

int checkpoint_save(const char *path, const Model *m, const Role *roles, int n_roles,
                    const Pair *pairs, int n_pairs, Error *e) {
    size_t n_items = (size_t)n_roles * (size_t)m->n_tensors, checksum_at;
    Item *items = malloc(n_items * sizeof *items);
    if (!items) return fail(e, "out of memory while saving %.200s", path);
    for (int r = 0; r < n_roles; r++)
        for (int i = 0; i < m->n_tensors; i++) {
            Item *item = &items[(size_t)r * (size_t)m->n_tensors + (size_t)i];
            *item = (Item){.tensor = &m->tensors[i], .values = roles[r].values};
            full_name(item->name, roles[r].name, m->tensors[i].name);
        }
    // By name, so that the file does not depend on the order in which roles were given.
    qsort(items, n_items, sizeof *items, by_item_name);
    Text header = make_header(m, roles, n_roles, pairs, n_pairs, items, n_items, &checksum_at);
    Output out = {0};
    int status = header.failed ? fail(e, "out of memory while saving %.200s", path)
                               : output_open(&out, path, true, e);
    if (status == 0) status = write_file(&out, &header, checksum_at, items, n_items, e);
    if (status == 0)
        status = output_commit(&out, e);
    else
        output_abandon(&out);
    free(header.s);
    free(items);
    return status;
}

// ---- Reading: the header's grammar --------------------------------------------------------------

// Says what is wrong with the file, by name. What it quotes may come from the file: no control
// characters reach the terminal.
static int bad(const Checkpoint *ck, Error *e, const char *format, ...) {
    char text[ERROR_LEN];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *s = text; *s; s++)
        if ((unsigned char)*s < ' ' || (unsigned char)*s > '~') *s = '?';
    return fail(e, "%.200s: %.300s", ck->name, text);
}

// The header while it is read: only what a safetensors header can hold, level by level. Nothing
// recurses, so nothing nests deeper than the format does, and a loop's every turn eats a byte. All
// functions below return -1 with the error filled in.
typedef struct {
    Checkpoint *ck;
    char *p, *end;
    size_t room;  // of ck->entries
    Error *e;
} Json;

static int malformed(const Json *j, const char *expected) {
    return bad(j->ck, j->e, "the header is malformed at byte %zu: expected %s",
               (size_t)(j->p - j->ck->header), expected);
}

// Leaves p at it.
static char peek(Json *j) {  // the next character that is not white space, 0 at the end
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\n' || *j->p == '\r' || *j->p == '\t'))
        j->p++;
    return j->p < j->end ? *j->p : 0;
}

// Takes c, after white space; anything else is malformed.
static int expect(Json *j, char c) {
    const char text[] = {'\'', c, '\'', 0};
    if (peek(j) != c) return malformed(j, text);
    j->p++;
    return 0;
}

// The XXXX of \uXXXX.
static int hex4(Json *j, uint32_t *out) {
    *out = 0;
    for (int i = 0; i < 4; i++, j->p++) {
        char c = j->p < j->end ? *j->p : 0;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return malformed(j, "four hexadecimal digits");
        *out = *out << 4 | (uint32_t)digit;
    }
    return 0;
}

// What follows \u, as UTF-8 at *to. It is never longer than the escape, so it fits in its place.
static int unicode_escape(Json *j, char **to) {
    uint32_t c, low;
    if (hex4(j, &c)) return -1;
    // Strings end in NUL here: one inside would hide the rest from every comparison.
    if (c == 0) return malformed(j, "no NUL in a string");
    // Beyond U+FFFF JSON writes two escapes: a high surrogate, 10 bits, then a low one, 10 more.
    if (c >= 0xD800 && c < 0xE000) {
        bool pair = c < 0xDC00 && j->end - j->p > 2 && j->p[0] == '\\' && j->p[1] == 'u';
        if (pair) j->p += 2;
        if (!pair || hex4(j, &low) || low < 0xDC00 || low > 0xDFFF)
            return malformed(j, "a surrogate pair");
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
    }
    // \uXXXX, 6 bytes, becomes 1 to 3; a pair, 12 bytes, becomes 4.
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (int i = n - 1; i > 0; i--, c >>= 6) (*to)[i] = (char)(0x80 | (c & 0x3F));
    (*to)[0] = (char)(lead[n] | c);
    *to += n;
    return 0;
}

// A string of at most `most` bytes, unescaped in place and ended by a NUL where its quote was or
// before.
static int parse_string(Json *j, const char **out, size_t most) {
    static const char from[] = "\"\\/bfnrt", is[] = "\"\\/\b\f\n\r\t";
    if (expect(j, '"')) return -1;
    char *start = j->p, *to = start;
    while (j->p < j->end && *j->p != '"') {
        uint8_t c = (uint8_t)*j->p;
        if (c < 0x20) return malformed(j, "no control character in a string");
        if (c == '\\') {
            char escape = ++j->p < j->end ? *j->p++ : 0;
            const char *found = escape ? strchr(from, escape) : NULL;
            if (escape == 'u' ? unicode_escape(j, &to) : found == NULL)
                return escape == 'u' ? -1 : malformed(j, "a valid escape");
            if (found) *to++ = is[found - from];
        } else {
            int n = utf8_length((uint8_t *)j->p, (uint8_t *)j->end);
            if (n == 0) return malformed(j, "valid UTF-8");
            // `to` lags behind p once an escape has become shorter: the two may overlap.
            memmove(to, j->p, (size_t)n);
            to += n;
            j->p += n;
        }
        if ((size_t)(to - start) > most) return malformed(j, "a shorter string");
    }
    if (j->p == j->end) return malformed(j, "the end of a string");
    j->p++;
    *to = 0;
    *out = start;
    return 0;
}

// Digits only: no sign, fraction, exponent or leading zero; within 64 bits.
static int parse_number(Json *j, uint64_t *out) {
    char first = peek(j);
    char *start = j->p;
    for (*out = 0; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++) {
        uint64_t digit = (uint64_t)(*j->p - '0');
        if (*out > (UINT64_MAX - digit) / 10) return malformed(j, "a number below 2^64");
        *out = *out * 10 + digit;
    }
    if (j->p == start) return malformed(j, "digits");
    if (first == '0' && j->p - start > 1) return malformed(j, "a number without leading zeros");
    return 0;
}

// [a, b, ...] of at most `most` numbers.
static int parse_numbers(Json *j, uint64_t *out, int most, int *n) {
    if (expect(j, '[')) return -1;
    for (*n = 0; peek(j) != ']'; (*n)++) {
        if (*n > 0 && expect(j, ',')) return -1;
        if (*n == most) return malformed(j, most == 2 ? "two offsets" : "at most 3 dimensions");
        if (parse_number(j, &out[*n])) return -1;
    }
    j->p++;
    return 0;
}

// {"key": "value", ...}: nothing but strings, no key twice, MAX_PAIRS at most.
static int parse_metadata(Json *j) {
    Checkpoint *ck = j->ck;
    if (expect(j, '{')) return -1;
    while (peek(j) != '}') {
        Pair pair;
        if (ck->n_pairs > 0 && expect(j, ',')) return -1;
        if (parse_string(j, &pair.key, MAX_NAME) || expect(j, ':') ||
            parse_string(j, &pair.value, MAX_VALUE))
            return -1;
        if (checkpoint_get(ck, pair.key))
            return bad(ck, j->e, "the metadata has '%.60s' twice", pair.key);
        if (ck->n_pairs == MAX_PAIRS)
            return bad(ck, j->e, "the metadata has more than %d entries", MAX_PAIRS);
        ck->pairs[ck->n_pairs++] = pair;
    }
    j->p++;
    return 0;
}

// {"dtype": ..., "shape": ..., "data_offsets": ...}, each once, in any order.
static int parse_tensor(Json *j, Entry *entry) {
    // Three fields, none unknown, none twice: then each is there once.
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    bool seen[3] = {false};
    uint64_t offsets[2];
    int n_offsets = 0;
    if (expect(j, '{')) return -1;
    for (int i = 0; i < 3; i++) {
        const char *field, *dtype;
        if (i > 0 && expect(j, ',')) return -1;
        if (parse_string(j, &field, MAX_NAME) || expect(j, ':')) return -1;
        int f = 0;
        while (f < 3 && strcmp(field, fields[f])) f++;
        if (f == 3 || seen[f])
            return bad(j->ck, j->e, "tensor %.60s has %s field '%.60s'", entry->name,
                       f == 3 ? "an unknown" : "twice the", field);
        seen[f] = true;
        if (f == 1 && parse_numbers(j, entry->dims, 3, &entry->ndim)) return -1;
        if (f == 2 && parse_numbers(j, offsets, 2, &n_offsets)) return -1;
        if (f == 0 && parse_string(j, &dtype, MAX_NAME)) return -1;
        if (f == 0 && strcmp(dtype, "F32"))
            return bad(j->ck, j->e, "tensor %.60s is of type %.60s, expected F32", entry->name,
                       dtype);
    }
    if (n_offsets != 2) return malformed(j, "two offsets");
    entry->begin = offsets[0];
    entry->end = offsets[1];
    return expect(j, '}');
}

// A tensor's shape, size and place agree with each other and lie within the file.
static int check_span(const Checkpoint *ck, const Entry *t, Error *e) {
    // 4: float32
    uint64_t bytes = 4, there = ck->size - ck->data;
    for (int i = 0; i < t->ndim; i++) {
        if (t->dims[i] == 0) return bad(ck, e, "tensor %.60s has a dimension of 0", t->name);
        // Asked before the product is made: one that has wrapped round could fit the span.
        if (bytes > UINT64_MAX / t->dims[i])
            return bad(ck, e, "the shape of tensor %.60s overflows 64 bits", t->name);
        bytes *= t->dims[i];
    }
    if (t->begin > t->end || t->end > there)
        return bad(ck, e, "tensor %.60s is said to be at %llu to %llu of %llu bytes of data",
                   t->name, (unsigned long long)t->begin, (unsigned long long)t->end,
                   (unsigned long long)there);
    if (t->end - t->begin != bytes)
        return bad(ck, e, "tensor %.60s spans %llu bytes, its shape needs %llu", t->name,
                   (unsigned long long)(t->end - t->begin), (unsigned long long)bytes);
    return 0;
}

// {"__metadata__": {...}, "name": {...}, ...} and spaces. Every tensor that it takes lies inside
// the file and has the size of its shape.
static int parse_header(Json *j) {
    Checkpoint *ck = j->ck;
    bool metadata = false;
    if (j->p == j->end || *j->p != '{') return malformed(j, "'{', as a safetensors file has");
    j->p++;
    for (bool first = true; peek(j) != '}'; first = false) {
        Entry entry = {0};
        if (!first && expect(j, ',')) return -1;
        if (parse_string(j, &entry.name, MAX_NAME) || expect(j, ':')) return -1;
        if (strcmp(entry.name, "__metadata__") == 0) {
            if (metadata) return bad(ck, j->e, "the header has two __metadata__");
            metadata = true;
            if (parse_metadata(j)) return -1;
            continue;
        }
        if (parse_tensor(j, &entry) || check_span(ck, &entry, j->e)) return -1;
        if (ck->n_entries == j->room) {
            // An entry costs the file at least its braces and names, so memory stays in proportion.
            size_t room = 2 * j->room + 64;
            Entry *more = realloc(ck->entries, room * sizeof *more);
            if (!more) return bad(ck, j->e, "out of memory");
            ck->entries = more;
            j->room = room;
        }
        ck->entries[ck->n_entries++] = entry;
    }
    for (j->p++; j->p < j->end; j->p++)
        if (*j->p != ' ') return malformed(j, "nothing but spaces after the last '}'");
    return metadata ? 0 : bad(ck, j->e, "no __metadata__: not a model of fuzzytok");
}

// ---- Reading: is it a model, complete and nothing else? -----------------------------------------

static int by_name(const void *a, const void *b) {
    return strcmp(((const Entry *)a)->name, ((const Entry *)b)->name);
}
static int by_begin(const void *a, const void *b) {
    uint64_t x = ((const Entry *)a)->begin, y = ((const Entry *)b)->begin;
    return (x > y) - (x < y);
}

// Every byte of the data belongs to exactly one tensor; every name is there once.
// (Sorted by place each must start where the one before ends; then by name, for good.)
static int check_cover(Checkpoint *ck, Error *e) {
    uint64_t at = 0, there = ck->size - ck->data;
    qsort(ck->entries, ck->n_entries, sizeof *ck->entries, by_begin);
    for (size_t i = 0; i < ck->n_entries; i++) {
        const Entry *t = &ck->entries[i];
        // No span is empty (check_span), so two tensors cannot share a beginning unseen.
        if (t->begin != at)
            return bad(ck, e, "tensor %.60s starts at byte %llu of the data, %s %llu", t->name,
                       (unsigned long long)t->begin,
                       t->begin < at ? "inside the one that ends at" : "after a gap from",
                       (unsigned long long)at);
        at = t->end;
    }
    if (at != there)
        return bad(ck, e, "the tensors end at byte %llu of the data, which has %llu",
                   (unsigned long long)at, (unsigned long long)there);
    qsort(ck->entries, ck->n_entries, sizeof *ck->entries, by_name);
    for (size_t i = 1; i < ck->n_entries; i++)
        if (by_name(&ck->entries[i - 1], &ck->entries[i]) == 0)
            return bad(ck, e, "tensor %.60s is there twice", ck->entries[i].name);
    return 0;
}

// Is it ours, of this version, and does it say every value of a configuration that can be?
static int read_config(Checkpoint *ck, Error *e) {
    const char *model = checkpoint_get(ck, "model"), *made = checkpoint_get(ck, "version");
    if (!model || strcmp(model, "fuzzytok"))
        return bad(ck, e, "made for another program (%.60s), expected a model of fuzzytok",
                   model ? model : "the metadata names none");
    if (!made || strcmp(made, version))
        return bad(ck, e, "version '%.60s' of the format, this program reads version %s",
                   made ? made : "", version);
    for (int key = 0; key < CONFIG_KEYS; key++) {
        const char *text = checkpoint_get(ck, config_keys[key].name);
        if (!text) text = config_keys[key].fallback;
        if (!text || !config_from_text(&ck->config, key, text))
            return bad(ck, e, "the metadata has %s%.60s for %s",
                       text ? "the invalid value " : "nothing", text ? text : "",
                       config_keys[key].name);
    }
    // config_check's words, with the file's name before them.
    Error why;
    return config_check(&ck->config, &why) ? bad(ck, e, "the metadata is wrong: %.200s", why.text)
                                           : 0;
}

// "params,m,v" into ck->roles. No such key: a model file, whose one role is "".
static int read_roles(Checkpoint *ck, Error *e) {
    const char *text = checkpoint_get(ck, "roles");
    ck->is_state = text != NULL;
    ck->roles[ck->n_roles++] = ck->role_names;
    if (!text) return 0;
    if (strlen(text) >= sizeof ck->role_names) return bad(ck, e, "the list of roles is too long");
    memcpy(ck->role_names, text, strlen(text) + 1);
    for (char *s = ck->role_names; *s; s++) {
        // A comma too many falls through, to where it is no letter.
        if (*s == ',' && ck->n_roles < MAX_ROLES) {
            *s = 0;
            ck->roles[ck->n_roles++] = s + 1;
        } else if (*s < 'a' || *s > 'z') {
            return bad(ck, e, "the roles are '%.60s', expected at most %d words like m,v", text,
                       MAX_ROLES);
        }
    }
    for (int i = 0; i < ck->n_roles; i++) {
        bool twice = false;
        for (int k = 0; k < i; k++) twice = twice || strcmp(ck->roles[i], ck->roles[k]) == 0;
        if (twice || *ck->roles[i] == 0 || strlen(ck->roles[i]) > 15)
            return bad(ck, e, "the roles are '%.60s', expected different short words", text);
    }
    return 0;
}

// After check_cover, which has sorted the entries. NULL: no such tensor.
static Entry *find(const Checkpoint *ck, const char *role, const char *tensor) {
    char name[MAX_NAME + 1];
    full_name(name, role, tensor);
    const Entry key = {.name = name};
    return bsearch(&key, ck->entries, ck->n_entries, sizeof key, by_name);
}

// The tensor is there, in the shape that the model has; its entry is marked as known.
static int check_tensor(const Checkpoint *ck, const char *role, const Tensor *t, Error *e) {
    Entry *entry = find(ck, role, t->name);
    if (!entry) return bad(ck, e, "tensor %s%s%s is missing", role, *role ? "/" : "", t->name);
    entry->known = true;
    uint64_t dims[3];
    file_dims(t, dims);
    bool same = entry->ndim == t->ndim;
    for (int d = 0; same && d < t->ndim; d++) same = entry->dims[d] == dims[d];
    if (same) return 0;
    char text[2][80] = {"", ""};
    for (int i = 0; i < 2; i++)
        for (int d = 0; d < (i ? t->ndim : entry->ndim); d++)
            snprintf(text[i] + strlen(text[i]), sizeof text[i] - strlen(text[i]),
                     d ? ",%llu" : "%llu", (unsigned long long)(i ? dims[d] : entry->dims[d]));
    return bad(ck, e, "tensor %.60s has shape (%s), expected (%s)", entry->name, text[0], text[1]);
}

static int count_units(const Config *c) {
    Unit *units = malloc(MAX_UNITS * sizeof *units);
    Error e;
    int n = units ? units_parse(c->units, c->channels, c->activation, c->window, units, &e) : 0;
    int some = 0;
    for (int i = 0; i < n; i++) some += units[i].mixer->describe != NULL;
    free(units);
    return some;
}

// The file's tensors are those of the configuration, once per role.
static int check_tensors(Checkpoint *ck, Error *e) {
    // A file of a few bytes may claim many units, each of which has a tensor at least: no table is
    // made for it.
    int units = count_units(&ck->config);
    if (ck->n_entries < (size_t)units)
        return bad(ck, e, "%zu tensors, too few for the %d units of the metadata", ck->n_entries,
                   units);
    Error why;
    ck->table.config = ck->config;
    if (model_describe(&ck->table, &why)) return bad(ck, e, "%.200s", why.text);
    ck->n_params = ck->table.n_params;
    for (int r = 0; r < ck->n_roles; r++)
        for (int i = 0; i < ck->table.n_tensors; i++)
            if (check_tensor(ck, ck->roles[r], &ck->table.tensors[i], e)) return -1;
    for (size_t i = 0; i < ck->n_entries; i++)
        if (!ck->entries[i].known)
            return bad(ck, e, "tensor %.60s is not of this model", ck->entries[i].name);
    return 0;
}

// ---- Reading: from file or memory ---------------------------------------------------------------

// n bytes at an offset of the file, which the caller knows to be inside it.
static int read_at(const Checkpoint *ck, uint64_t offset, void *to, size_t n, Error *e) {
    if (ck->bytes) {
        memcpy(to, ck->bytes + offset, n);
        return 0;
    }
    errno = 0;
    if (fseeko(ck->file, (off_t)offset, SEEK_SET) == 0 && fread(to, 1, n, ck->file) == n) return 0;
    return bad(ck, e, "cannot read: %s", errno ? strerror(errno) : "it became shorter");
}

// The checksum covers everything after the length, its own digits taken as zeros. A model without
// one was written by another program, PyTorch for example: welcome. A state always has one.
static int verify_checksum(const Checkpoint *ck, Error *e) {
    const char *said = checkpoint_get(ck, "checksum");
    if (!said && ck->is_state)
        return bad(ck, e, "a training state without checksum: edited, or not written by ./train");
    if (!said) return 0;
    // From the file once more: the header in memory has been unescaped in place. Where a string
    // starts has not moved, so its place in memory is its place in the file.
    uint64_t hash = CHECKSUM_START, digits_at = 8 + (uint64_t)(said - ck->header);
    uint8_t bytes[4 * CHUNK];
    for (uint64_t at = 8; at < ck->size; at += sizeof bytes) {
        size_t n = ck->size - at < sizeof bytes ? (size_t)(ck->size - at) : sizeof bytes;
        if (read_at(ck, at, bytes, n, e)) return -1;
        // The digits may lie across two pieces.
        for (uint64_t i = digits_at; i < digits_at + CHECKSUM_DIGITS; i++)
            if (i >= at && i < at + n) bytes[i - at] = '0';
        hash = checksum_add(hash, bytes, n);
    }
    char found[CHECKSUM_DIGITS + 1];
    snprintf(found, sizeof found, "%0*llx", CHECKSUM_DIGITS, (unsigned long long)hash);
    if (strcmp(found, said) == 0) return 0;
    return bad(ck, e,
               "the checksum is %s, not the %.20s that it says: damaged, or edited without "
               "removing \"checksum\" from the metadata",
               found, said);
}

// Everything from the length on; file or bytes, size and name are set. The order lets each check
// rely on those before it: the length, the grammar with every span inside the file, program and
// configuration, no gap, overlap or name twice, the tensors of that configuration, the checksum.
static int read_header(Checkpoint *ck, Error *e) {
    uint8_t length[8];
    uint64_t n = 0;
    if (ck->size < 8) return bad(ck, e, "not a safetensors file: %d bytes long", (int)ck->size);
    if (read_at(ck, 0, length, 8, e)) return -1;
    // Little-endian on any machine; bounded before it is added to or allocated.
    for (int b = 0; b < 8; b++) n |= (uint64_t)length[b] << (8 * b);
    if (n > ck->size - 8 || n > MAX_HEADER)
        return bad(ck, e,
                   "not a safetensors file, or cut off: a header of %llu bytes in a file of %llu",
                   (unsigned long long)n, (unsigned long long)ck->size);
    ck->data = 8 + n;
    ck->header = malloc((size_t)n + 1);
    if (!ck->header) return bad(ck, e, "out of memory");
    if (read_at(ck, 8, ck->header, (size_t)n, e)) return -1;
    Json j = {.ck = ck, .p = ck->header, .end = ck->header + n, .e = e};
    if (parse_header(&j) || read_config(ck, e) || read_roles(ck, e) || check_cover(ck, e) ||
        check_tensors(ck, e))
        return -1;
    return verify_checksum(ck, e);
}

// The common end of both; on failure nothing stays open or allocated.
static int open_from(Checkpoint *ck, const char *name, Error *e) {
    ck->name = strdup(name);
    int status = ck->name ? read_header(ck, e) : fail(e, "out of memory");
    if (status) checkpoint_close(ck);
    return status;
}

int checkpoint_parse(Checkpoint *ck, const char *name, const void *bytes, size_t size, Error *e) {
    *ck = (Checkpoint){.bytes = bytes, .size = size};
    return open_from(ck, name, e);
}

int checkpoint_open(Checkpoint *ck, const char *path, Error *e) {
    *ck = (Checkpoint){0};
    struct stat st;
    if (stat(path, &st)) return fail(e, "cannot read %.200s: %s", path, strerror(errno));
    // A pipe would have no size, and to open one could wait for ever.
    if (!S_ISREG(st.st_mode))
        return fail(e, "%.200s is %s, expected a safetensors file", path,
                    S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
    FILE *f = fopen(path, "rb");
    if (!f) return fail(e, "cannot read %.200s: %s", path, strerror(errno));
    ck->file = f;
    ck->size = (uint64_t)st.st_size;
    return open_from(ck, path, e);
}

void checkpoint_close(Checkpoint *ck) {
    if (ck->file) fclose(ck->file);
    free(ck->name);
    free(ck->header);
    free(ck->entries);
    model_free(&ck->table);
    *ck = (Checkpoint){0};
}

// ---- What a sound file gives --------------------------------------------------------------------

const char *checkpoint_get(const Checkpoint *ck, const char *key) {
    for (int i = 0; i < ck->n_pairs; i++)
        if (strcmp(ck->pairs[i].key, key) == 0) return ck->pairs[i].value;
    return NULL;
}

bool checkpoint_own_key(const char *key) {
    static const char *const others[] = {"format", "model", "version", "roles", "checksum"};
    for (int i = 0; i < 5; i++)
        if (strcmp(others[i], key) == 0) return true;
    for (int i = 0; i < CONFIG_KEYS; i++)
        if (strcmp(config_keys[i].name, key) == 0) return true;
    return false;
}

bool checkpoint_has_role(const Checkpoint *ck, const char *role) {
    for (int i = 0; i < ck->n_roles; i++)
        if (strcmp(ck->roles[i], role) == 0) return true;
    return false;
}

int checkpoint_match(const Checkpoint *ck, const Config *c, Error *e) {
    char list[ERROR_LEN] = "";
    for (int key = 0; key < CONFIG_KEYS; key++) {
        ConfigText here = config_text(&ck->config, key), wanted = config_text(c, key);
        size_t n = strlen(list);
        if (strcmp(here.s, wanted.s))
            snprintf(list + n, sizeof list - n, "%s%s is %.40s there and %.40s here", n ? ", " : "",
                     config_keys[key].name, here.s, wanted.s);
    }
    return *list ? bad(ck, e, "another configuration: %s", list) : 0;
}

// The inverse of write_values: every value of a tensor to its place in host.
static int read_values(const Checkpoint *ck, const Tensor *t, const Entry *entry, real *host,
                       Error *e) {
    uint8_t bytes[4 * CHUNK];
    for (size_t i0 = 0; i0 < t->size; i0 += CHUNK) {
        size_t n = t->size - i0 < CHUNK ? t->size - i0 : CHUNK;
        if (read_at(ck, ck->data + entry->begin + 4 * (uint64_t)i0, bytes, 4 * n, e)) return -1;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = 0;
            for (int b = 0; b < 4; b++) bits |= (uint32_t)bytes[4 * i + (size_t)b] << (8 * b);
            float x;
            memcpy(&x, &bits, sizeof x);
            if (x - x != 0)
                return bad(ck, e, "value %zu of tensor %.60s is not finite", i0 + i, entry->name);
            host[t->offset + our_index(t, i0 + i)] = x;
        }
    }
    return 0;
}

int checkpoint_read(const Checkpoint *ck, const char *role, real *host, Error *e) {
    if (!checkpoint_has_role(ck, role))
        return bad(ck, e,
                   *role ? "has no '%s': not a training state, or one of another kind"
                         : "is a training state: give the model.safetensors beside it%s",
                   role);
    for (int i = 0; i < ck->table.n_tensors; i++) {
        const Tensor *t = &ck->table.tensors[i];
        if (read_values(ck, t, find(ck, role, t->name), host, e)) return -1;
    }
    return 0;
}

int checkpoint_load_model(Model *m, const char *path, const Backend *backend, int B, int T,
                          Error *e) {
    Checkpoint ck;
    *m = (Model){0};
    if (checkpoint_open(&ck, path, e)) return -1;
    real *host = malloc(ck.n_params * sizeof *host);
    int status = host ? checkpoint_read(&ck, "", host, e) : bad(&ck, e, "out of memory");
    if (status == 0) status = model_open(m, backend, &ck.config, B, T, NULL, e);
    if (status == 0) model_write(m, m->params, host);
    free(host);
    checkpoint_close(&ck);
    return status;
}

#ifdef FUZZ
// make fuzz: any bytes end in an error or in a file whose every value can be read.
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    Checkpoint ck;
    Error e;
    if (checkpoint_parse(&ck, "fuzz", bytes, size, &e)) return 0;
    real *host = malloc(ck.n_params * sizeof *host);
    for (int r = 0; r < ck.n_roles && host; r++) checkpoint_read(&ck, ck.roles[r], host, &e);
    free(host);
    checkpoint_close(&ck);
    return 0;
}
#endif
