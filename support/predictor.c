// predictor.c: the three predictors. Read predictor.h first, then mix.c.
#include "support/predictor.h"

#include <stdlib.h>

#include "fast/layers.h"
#include "support/arithmetic.h"
#include "support/output.h"
#include "support/portable.h"

const char *const mix_names[] = {"none", "ngram", "cm", NULL};

// ---- The n-gram, as a first lesson --------------------------------------------------------------
//
// For the longest of the last 6 .. 1 bytes that stood here twice or more: what followed them, in
// shares; and p = (1 - a) p_network + a share. a grows with the network's doubt, its entropy H in
// nats: a = 0.05 + 0.2 sigmoid(3.5 H), fitted to bytes; without a network it is 0.9. Keys are
// whole, so that no two contexts share a count, and the shares of a context add up to 1: all 256
// are asked, and not only the byte that comes. (A cache that hashes context and byte together does
// neither, and its "probabilities" add up to more than a hundred.)

enum { NGRAM_LONGEST = 6, NGRAM_BITS = 23 };

struct Ngrams {
    uint64_t last;  // bytes, the newest lowest
    size_t used;    // at most 7/8 of the places; then only what is known is counted
    struct {
        uint64_t key;  // 0: free
        uint32_t n;
    } at[1 << NGRAM_BITS];
};

// What the last `length` bytes are followed by: byte 0..255; or V, anything.
static uint64_t ngram_key(const Ngrams *g, int length, int byte) {
    uint64_t context = g->last & (((uint64_t)1 << (8 * length)) - 1);
    return (context << 9 | (uint64_t)byte) << 3 | (uint64_t)length;
}

static size_t ngram_place(const Ngrams *g, uint64_t key) {
    size_t i = hash2(key, 0) >> (64 - NGRAM_BITS);
    while (g->at[i].key && g->at[i].key != key) i = (i + 1) & ((1 << NGRAM_BITS) - 1);
    return i;
}

static void ngram_learn(Ngrams *g, int byte) {
    for (int length = 1; length <= NGRAM_LONGEST; length++)
        for (int one = 0; one < 2; one++) {
            uint64_t key = ngram_key(g, length, one ? byte : V);
            size_t i = ngram_place(g, key);
            bool room = g->used < ((size_t)7 << NGRAM_BITS) / 8;
            if (!g->at[i].key && !room) continue;
            g->used += !g->at[i].key;
            g->at[i].key = key;
            g->at[i].n++;
        }
    g->last = g->last << 8 | (uint64_t)byte;
}

// freq (V), of sum `total`, becomes the mixture; still none is 0.
static void ngram_mix(const Ngrams *g, uint32_t *freq, uint32_t total, bool network) {
    int length = NGRAM_LONGEST;
    uint32_t n = 0;
    double H = 0;
    for (; length > 0; length--)
        if ((n = g->at[ngram_place(g, ngram_key(g, length, V))].n) >= 2) break;
    if (length == 0) return;
    for (int v = 0; v < V; v++) {
        double p = (double)freq[v] / total;
        H -= p * portable_log(p);
    }
    double a = network ? 0.05 + 0.2 / (1 + portable_exp(-3.5 * H)) : 0.9;
    for (int v = 0; v < V; v++) {
        double share = (double)g->at[ngram_place(g, ngram_key(g, length, v))].n / n;
        freq[v] = 1 + (uint32_t)((1 - a) * freq[v] + a * share * (1 << 24));
    }
}

uint32_t frequencies(uint32_t freq[V], const real *logits, float cap) {
    real e[V], top = -INFINITY;
    double sum = 0;
    uint32_t total = 0;
    for (int v = 0; v < V; v++) {
        e[v] = logits ? logits[v] : 0;
        if (cap > 0) e[v] = (real)(cap * portable_tanh((double)e[v] / cap));
        top = e[v] > top ? e[v] : top;
    }
    for (int v = 0; v < V; v++) e[v] = exp_real(e[v] - top);
    for (int v = 0; v < V; v++) sum += (double)e[v];
    for (int v = 0; v < V; v++) {
        double share = (double)e[v] / sum;
        freq[v] = 1 + (share <= 1 ? (uint32_t)(share * (1 << 24)) : 0);  // a NaN counts as 0
        total += freq[v];
    }
    return total;
}

// ---- Predictors ---------------------------------------------------------------------------------

double predictor_memory(MixKind kind) {
    return kind == MIX_CM ? (double)mixture_memory() : kind == MIX_NGRAM ? sizeof(Ngrams) : 0;
}

// logits: the network's of the byte that begins; NULL: it says nothing.
static void begin_byte(Predictor *p, const real *logits) {
    uint32_t *leaf = p->tree + V;
    p->node = 1;
    if (logits || !p->mixture) {
        float cap = logits ? p->network->table.config.softcap : 0;
        p->said_sum = frequencies(p->said, logits, cap);
        memcpy(leaf, p->said, sizeof p->said);
        if (p->ngrams) ngram_mix(p->ngrams, leaf, p->said_sum, logits != NULL);
        for (int n = V - 1; n > 0; n--) p->tree[n] = p->tree[2 * n] + p->tree[2 * n + 1];
    }
    if (p->mixture) mixture_begin(p->mixture, logits ? p->tree : NULL);
}

int predictor_open(Predictor *p, MixKind kind, Stream *network, Error *e) {
    *p = (Predictor){.kind = kind, .network = network};
    if (kind == MIX_CM) p->mixture = mixture_open(network != NULL);
    if (kind == MIX_NGRAM) p->ngrams = calloc(1, sizeof *p->ngrams);
    if (kind != MIX_NONE && !p->mixture && !p->ngrams)
        return fail(e, "out of memory: --mix %s takes %.0f MB", mix_names[kind],
                    predictor_memory(kind) / 1e6);
    begin_byte(p, NULL);
    return 0;
}

void predictor_free(Predictor *p) {
    free(p->ngrams);
    free(p->mixture);
    *p = (Predictor){0};
}

int predictor_bit(const Predictor *p) {
    return p->mixture ? mixture_bit(p->mixture) : tree_bit(p->tree, p->node);
}

static void tell(Predictor *p, int bit, Stream *network) {
    real logits[V];
    if (p->mixture) mixture_tell(p->mixture, bit);
    p->node = 2 * p->node + bit;
    if (p->node < V) return;
    int byte = p->node - V;
    if (p->ngrams) ngram_learn(p->ngrams, byte);
    if (network) stream_push(network, &byte, NULL, logits);
    begin_byte(p, network ? logits : NULL);
}

void predictor_tell(Predictor *p, int bit) { tell(p, bit, p->network); }

double predictor_cost(Predictor *p, uint8_t byte) {
    double nats = 0;
    for (int k = 7; k >= 0; k--) {
        int bit = byte >> k & 1, one = predictor_bit(p);
        nats -= log((double)(bit ? one : ONE_BIT - one) / ONE_BIT);
        predictor_tell(p, bit);
    }
    return nats;
}

double predictor_network_cost(const Predictor *p, uint8_t byte) {
    return p->said_sum ? -log((double)p->said[byte] / p->said_sum) : log(V);
}

// The tree, each of whose nodes splits what its parent has.
void predictor_bytes(const Predictor *p, uint32_t freq[V]) {
    uint32_t mass[2 * V] = {0, ONE_BYTE};
    if (p->mixture) {
        mixture_bytes(p->mixture, freq);
        return;
    }
    for (int n = 1, leaves = V / 2; n < V; n++) {
        if (n >= V / leaves) leaves /= 2;
        mass[2 * n + 1] = mass_of_one(mass[n], tree_bit(p->tree, n), (uint32_t)leaves);
        mass[2 * n] = mass[n] - mass[2 * n + 1];
    }
    memcpy(freq, mass + V, V * sizeof *freq);
}

void predictor_prime(Predictor *p, const uint8_t *text, size_t n) {
    for (size_t i = 0; i < n && (p->mixture || p->ngrams); i++)
        for (int k = 7; k >= 0; k--) tell(p, text[i] >> k & 1, NULL);
    if (p->mixture && p->network) mixture_join(p->mixture);
}

int arithmetic_check(Error *e) {
    // What a unit does to a row, and a distribution: compiled as the streams are.
    real x[V], y[V];
    uint32_t freq[V];
    uint64_t hash = CHECKSUM_START;
    for (int v = 0; v < V; v++) x[v] = (real)((v * 37 + 11) % V - 100) / 48;
    for (int round = 0; round < 4; round++) {
        norm_row(y, x, x, x, V);
        act_row(ACT_gelu, x, y, x, (real)0.3, V);
        for (int v = 1; v < V; v++) x[v] = muladd(x[v], y[v - 1], x[v - 1] / 3);
    }
    frequencies(freq, x, 5);
    for (int v = 0; v < V; v++) {
        double z[4] = {portable_sin(v / 100.0), portable_cos(v / 100.0), portable_log(1 + freq[v]),
                       portable_exp(-v)};
        hash = checksum_add(checksum_add(hash, freq + v, sizeof *freq), z, sizeof z);
    }
    if (hash == 0xae4295cbc69456afu) return 0;
    return fail(e, "this build rounds otherwise than IEEE 754 says (%016llx), so its archives "
                   "would open nowhere: build it with the Makefile's flags",
                (unsigned long long)hash);
}
