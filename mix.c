// mix.c: a network and counts, mixed. Read mix.h first, then this from the top.
//
// Why it pays. A network of a million weights knows English; it does not know that this text calls
// its hero Petruchio. A table of what followed each context so far does, from one sight on. How far
// to trust which of them is learnt, too, while the text is read.
//
// Why bits. A byte is coded as eight choices between 0 and 1. For a choice each context keeps one
// number, one number is easy to mix, and the 256 bytes' sum is 1 whatever is mixed: every choice
// splits what is left in two.
//
// Why log-odds. stretch(p) = ln(p / (1 - p)). Independent evidence multiplies odds, so it adds
// log-odds; and a source that is sure (p near 0 or 1) counts for more than it would in an average
// of probabilities. So   p = squash(sum_i w_i stretch(p_i)),   squash(x) = 1 / (1 + exp(-x)).
// A bit costs -ln p(bit). The slope of that by w_i is -(bit - p) stretch(p_i), and down that slope
// the weights move a little after every bit: logistic regression, while it is used. (Mahoney,
// "Adaptive Weighing of Context Models for Lossless Data Compression", 2005: the PAQ programs.)
//
// Why several sets of weights. Whom to trust depends on where one stands: in a long match the
// match, after a context that was seen a hundred times that one. Each of SETS takes its row of
// weights by something else that is known before the bit; their outputs are mixed once more.
//
// Integers throughout: p in 1/65536, log-odds in 1/256 nat, weights in 1/65536.
#include "mix.h"

#include <stdlib.h>
#include <string.h>

#include "support/portable.h"

// ---- The context mixer: what it consists of -----------------------------------------------------

enum {
    ORDERS = 7,             // contexts of the last 0 .. 6 bytes,
    CONTEXTS = ORDERS + 4,  // two of words, one of the column, one that skips the last byte
    INPUTS = 3 * CONTEXTS + 5,
    WIDTH = (INPUTS + 7) / 8 * 8,  // whole vectors; what is too many stays 0
    OF_MATCH = 3 * CONTEXTS,       // inputs of the match, of the network, and the constant
    OF_NETWORK = OF_MATCH + 2,
    CONSTANT = OF_NETWORK + 2,
    MOST = 3071,            // log-odds lie in -MOST .. MOST, twelve nats
    BUCKET_BITS = 22,       // 2^22 buckets of 32 bytes for all contexts: 128 MiB
    TEXT_BITS = 22,         // bytes kept for matches: 4 MiB
    PLACE_BITS = 20,
    MATCH_LEAST = 6, MATCH_MOST = 48,
    KNOTS = 33,
};

// What a context has seen of one bit: the share of ones, of how many, and the last seven bits
// behind a leading 1.
typedef struct {
    uint16_t p;
    uint8_t n, history;
} Slot;
// A byte's bits fall in groups of 3, 3 and 2. A bucket has the slots of one group under one
// context, 1 + 2 + 4 of them, in half a line of cache: read once for three bits.
typedef struct {
    uint32_t check;
    Slot slot[7];
} Bucket;

// The sets of weights: how many rows each has. Rows that depend on the network begin with those for
// its absence.
enum { SETS = 6, BY_ORDER = ORDERS * V, BY_NETWORK = V, NETWORK_STEPS = 9,
       BY_MATCH = 4 * ORDERS * 8, SURE_STEPS = 5, BY_BYTE = 4 * V, BY_CLASS = 2 * 8 * 8,
       BY_COUNTS = 256 };
static const int set_rows[SETS] = {BY_ORDER, BY_NETWORK *NETWORK_STEPS, BY_MATCH *SURE_STEPS,
                                   BY_BYTE, BY_CLASS, BY_COUNTS};
enum { ROWS = BY_ORDER + BY_NETWORK * NETWORK_STEPS + BY_MATCH * SURE_STEPS + BY_BYTE + BY_CLASS +
              BY_COUNTS };

// One prediction and what it was made of, for learning.
typedef struct {
    int node, bits;  // 1 and the bits of the byte so far; how many
    Bucket *bucket[CONTEXTS];
    Slot *slot[CONTEXTS];
    int matched, expected;  // length of the match, 0: none; the byte that followed, + 256
    uint16_t *match_p;
    int32_t x[WIDTH], *w[SETS], *w_last;
    int set_x[SETS], set_p[SETS], mixed;
    uint16_t *apm[2];  // the nearer knot of each
    int p;
} Now;

struct Mixture {
    uint64_t position, last;  // bytes read; the last eight, the newest lowest
    uint64_t hash[CONTEXTS], word, word_before, match_at;  // match_at: the place behind a match
    int column, seen;         // seen: bits, at most a million: the rate falls with it
    const uint32_t *tree;     // the network's distribution, NULL: it has no part
    int sure, likeliest;      // what that says: in steps, and which byte
    Now now;
    Bucket none;              // of a context that was never seen
    uint16_t history_p[CONTEXTS][V], match_p[MATCH_MOST + 1];
    int32_t weights[ROWS][WIDTH], w_last[V][SETS];
    uint16_t apm[2][V * V][KNOTS];
    uint32_t places[1 << PLACE_BITS];
    uint8_t text[1 << TEXT_BITS];
    Bucket buckets[1 << BUCKET_BITS];
};

// Made once, by arithmetic that is the same everywhere.
static uint16_t squash_table[2 * MOST + 1];
static int16_t stretch_table[4096];
static int32_t slot_rate[V];  // 65536 * 2/(2n+3): the n-th bit moves p by that part of the gap

static int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
static int squash(int x) { return squash_table[clamp(x, -MOST, MOST) + MOST]; }
static int stretch(int p) { return stretch_table[p >> 4]; }

static void make_tables(void) {
    for (int x = -MOST; x <= MOST; x++) {
        int p = (int)(ONE_BIT / (1 + portable_exp(-x / 256.0)) + 0.5);
        squash_table[x + MOST] = (uint16_t)clamp(p, 1, ONE_BIT - 1);
    }
    for (int i = 0; i < 4096; i++) {
        double p = (i + 0.5) / 4096;
        stretch_table[i] = (int16_t)(256 * portable_log(p / (1 - p)));
    }
    for (int n = 0; n < V; n++) slot_rate[n] = 65536 * 2 / (2 * n + 3);
}

// An APM begins as the identity.
static void start_apm(uint16_t apm[V * V][KNOTS]) {
    for (int i = 0; i < V * V; i++)
        for (int k = 0; k < KNOTS; k++)
            apm[i][k] = (uint16_t)squash(-MOST + k * (2 * MOST + 1) / (KNOTS - 1));
}

static void start_mixture(Mixture *m, bool network) {
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < CONSTANT; j++)
            // The network knows much before anything is counted.
            m->weights[i][j] = ONE_BIT * (j == OF_NETWORK ? 80 : j > OF_NETWORK ? 0 : network ? 5
                                          : 15) / 100;
    for (int i = 0; i < V; i++)
        for (int j = 0; j < SETS; j++) m->w_last[i][j] = ONE_BIT / SETS;
    for (int h = 1; h < V; h++) {
        int n = 0, ones = 0;
        for (int rest = h; rest > 1; rest >>= 1) n++, ones += rest & 1;
        for (int i = 0; i < CONTEXTS; i++)
            m->history_p[i][h] = (uint16_t)(ONE_BIT * (10 * ones + 4) / (10 * n + 8));
    }
    for (int i = 0; i <= MATCH_MOST; i++) m->match_p[i] = ONE_BIT / 10 * 9;
    for (int i = 0; i < 2; i++) start_apm(m->apm[i]);
}

// ---- Contexts -----------------------------------------------------------------------------------

// The bucket of a context and the bits so far. Where there is none, the less seen of two gives way;
// or with `make` false it is `none`.
static Bucket *find(Mixture *m, uint64_t h, bool make) {
    uint32_t check = (uint32_t)h | 1;
    Bucket *a = &m->buckets[h >> (64 - BUCKET_BITS)], *b = &m->buckets[h >> (64 - BUCKET_BITS) ^ 1];
    if (a->check == check) return a;
    if (b->check == check) return b;
    if (!make) return &m->none;
    if (b->slot[0].n < a->slot[0].n) a = b;
    memset(a, 0, sizeof *a);
    a->check = check;
    return a;
}

static void look_up(Mixture *m, Now *now, bool make) {
    int begin = now->bits >= 6 ? 6 : now->bits >= 3 ? 3 : 0;
    int within = (1 << (now->bits - begin)) - 1;
    uint64_t h[CONTEXTS];
    // All at once: memory answers one while it is asked for the next.
    for (int i = 0; i < CONTEXTS && now->bits == begin; i++) {
        h[i] = hash2(hash2(m->hash[i], (uint64_t)(now->node << 8 | i)), 0);
        __builtin_prefetch(&m->buckets[h[i] >> (64 - BUCKET_BITS)]);
    }
    for (int i = 0; i < CONTEXTS; i++) {
        if (now->bits == begin) now->bucket[i] = find(m, h[i], make);
        now->slot[i] = &now->bucket[i]->slot[within + (now->node & within)];
    }
}

// A match goes on, or the last place with the same six bytes is looked at. (A byte that differs in
// its last bit alone breaks no match: the next bit that differs does.)
static void find_match(Mixture *m) {
    enum { MASK = (1 << TEXT_BITS) - 1 };
    Now *now = &m->now;
    uint32_t *place = &m->places[hash2(m->last << 16, 0) >> (64 - PLACE_BITS)];
    if (now->matched) {
        now->matched += now->matched < MATCH_MOST;
        m->match_at++;
    } else if (*place && (uint32_t)m->position - *place < MASK - MATCH_MOST) {
        m->match_at = *place;
        while (now->matched < MATCH_MOST &&
               m->text[(m->match_at - 1 - (uint64_t)now->matched) & MASK] ==
                   m->text[(m->position - 1 - (uint64_t)now->matched) & MASK])
            now->matched++;
        if (now->matched < MATCH_LEAST) now->matched = 0;
    }
    now->expected = m->text[m->match_at & MASK] | V;
    *place = (uint32_t)m->position;
}

static void read_byte(Mixture *m, int c) {
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '\'' || c > 127;
    m->last = m->last << 8 | (uint64_t)c;
    m->text[m->position++ & ((1 << TEXT_BITS) - 1)] = (uint8_t)c;
    m->column = c == '\n' ? 0 : m->column + (m->column < V);
    if (letter) {
        m->word = hash2(m->word, (uint64_t)(c >= 'A' && c <= 'Z' ? c + 32 : c));
    } else if (m->word) {
        m->word_before = m->word;
        m->word = 0;
    }
    for (int i = 1; i < ORDERS; i++)
        m->hash[i] = hash2(m->hash[i - 1], m->last >> (8 * (i - 1)) & 255);
    m->hash[ORDERS] = hash2(m->word, (uint64_t)c);
    m->hash[ORDERS + 1] = hash2(m->word + (uint64_t)c, m->word_before);
    m->hash[ORDERS + 2] = hash2((uint64_t)m->column, (uint64_t)c);
    m->hash[ORDERS + 3] = m->last >> 8 & 0xFFFF;
    find_match(m);
}

// ---- Predict ------------------------------------------------------------------------------------

// Of each source its log-odds, and p - 1/2, which says little where the source is unsure.
// confidence: of 512.
static void add_inputs(int32_t *x, int p, int confidence) {
    x[0] = stretch(p);
    x[1] = (p - ONE_BIT / 2) * confidence >> 14;
}

// Fills x. Returns the longest order whose context has seen this bit.
static int gather(Mixture *m, Now *now) {
    int longest = 0;
    memset(now->x, 0, sizeof now->x);
    for (int i = 0; i < CONTEXTS; i++) {
        const Slot *s = now->slot[i];
        if (s->n == 0) continue;
        if (i < ORDERS) longest = i;
        add_inputs(now->x + 3 * i, s->p, 512 * 2 * s->n / (2 * s->n + 3));
        now->x[3 * i + 2] = stretch(m->history_p[i][s->history]);
    }
    if (now->expected >> (8 - now->bits) != now->node) now->matched = 0;
    if (now->matched) {
        bool one = now->expected >> (7 - now->bits) & 1;
        now->match_p = &m->match_p[now->matched];
        add_inputs(now->x + OF_MATCH, one ? *now->match_p : ONE_BIT - 1 - *now->match_p, 512);
    }
    if (m->tree) add_inputs(now->x + OF_NETWORK, tree_bit(m->tree, now->node), 512);
    now->x[CONSTANT] = 256;
    return longest;
}

static int amount(int n) { return n == 0 ? 0 : n < 4 ? 1 : n < 32 ? 2 : 3; }

// Each set's row of weights.
static void choose(Mixture *m, Now *now, int longest) {
    int match = now->matched ? 1 + (now->matched > 12) + (now->matched > 24) : 0;
    int said = m->tree ? 1 + clamp((now->x[OF_NETWORK] + 1024) >> 8, 0, NETWORK_STEPS - 2) : 0;
    int sure = m->tree ? m->sure : 0, c1 = (int)(m->last & 255), c2 = (int)(m->last >> 8 & 255);
    const int row[SETS] = {
        longest * V + now->node,
        said * BY_NETWORK + c1,
        sure * BY_MATCH + (match * ORDERS + longest) * 8 + now->bits,
        match * V + c2,
        ((m->word != 0) * 8 + c2 / 32) * 8 + now->bits,
        amount(now->slot[5]->n) * 64 + amount(now->slot[3]->n) * 16 +
            amount(now->slot[ORDERS]->n) * 4 + amount(now->slot[ORDERS + 1]->n)};
    for (int i = 0, begin = 0; i < SETS; begin += set_rows[i++])
        now->w[i] = m->weights[begin + row[i]];
    now->w_last = m->w_last[now->node];
}

// |w| < 2^19 and |x| < 2^12: no product overflows, nor does their sum.
static int dot(const int32_t *w, const int32_t *x) {
    int32_t sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += w[i] * x[i] >> 7;
    return clamp(sum >> 9, -MOST, MOST);
}

// The final correction (an "adaptive probability map"): what did happen when this was said here,
// after this byte, or while the network thought of that one? Between two knots it is interpolated.
static int corrected(Mixture *m, Now *now, int x) {
    int place = (x + MOST) * (KNOTS - 1), low = place / (2 * MOST + 1);
    int part = place % (2 * MOST + 1);
    int c1 = (int)(m->last & 255), other = m->tree ? m->likeliest : (int)(m->last >> 8 & 255);
    uint16_t *apm[2] = {m->apm[0][c1 * V + now->node], m->apm[1][other * V + now->node]};
    int sum = 2 * now->mixed;
    for (int i = 0; i < 2; i++) {
        const uint16_t *knot = apm[i] + low;
        sum += knot[0] + (knot[1] - knot[0]) * part / (2 * MOST + 1);
        now->apm[i] = apm[i] + low + (part > MOST);
    }
    return clamp(sum / 4, 1, ONE_BIT - 1);
}

// Of the bit after now->node, from what was learnt before it.
static void predict(Mixture *m, Now *now, bool make) {
    int64_t sum = 0;
    look_up(m, now, make);
    choose(m, now, gather(m, now));
    for (int i = 0; i < SETS; i++) {
        now->set_x[i] = dot(now->w[i], now->x);
        now->set_p[i] = squash(now->set_x[i]);
        sum += (int64_t)now->w_last[i] * now->set_x[i];
    }
    int x = clamp((int)(sum >> 16), -MOST, MOST);
    now->mixed = squash(x);
    now->p = corrected(m, now, x);
}

// ---- Learn --------------------------------------------------------------------------------------

static void move(uint16_t *p, int bit, int rate) {
    *p = (uint16_t)(*p + (((bit ? ONE_BIT - 1 : 0) - *p) * rate >> 16));
}

static void learn_slot(Slot *s, int bit) {
    if (s->n == 0) *s = (Slot){.p = ONE_BIT / 2, .history = 1};
    move(&s->p, bit, slot_rate[s->n]);
    s->n += s->n < 255;
    int history = s->history * 2 + bit;
    s->history = (uint8_t)(history < V ? history : V / 2 | (history & (V / 2 - 1)));
}

static void learn(Mixture *m, int bit) {
    enum { LIMIT = (1 << 19) - 1 };  // weights of 8
    Now *now = &m->now;
    int rate = 4 + 60 * 30000 / (30000 + m->seen);
    m->seen += m->seen < 1000000;
    for (int i = 0; i < SETS; i++) {
        int error = (bit * ONE_BIT - now->set_p[i]) * rate >> 4, *w = now->w[i];
        for (int j = 0; j < WIDTH; j++)
            w[j] = clamp(w[j] + ((now->x[j] * error + 32768) >> 16), -LIMIT, LIMIT);
    }
    int error = (bit * ONE_BIT - now->mixed) >> 4;
    for (int i = 0; i < SETS; i++)
        now->w_last[i] = clamp(now->w_last[i] + ((now->set_x[i] * error + 16384) >> 15), -LIMIT,
                               LIMIT);
    for (int i = 0; i < CONTEXTS; i++) {
        if (now->slot[i]->n) move(&m->history_p[i][now->slot[i]->history], bit, 256);
        learn_slot(now->slot[i], bit);
    }
    if (now->matched) move(now->match_p, bit == (now->expected >> (7 - now->bits) & 1), 328);
    for (int i = 0; i < 2; i++) move(now->apm[i], bit, 1311);
}

// ---- For others ---------------------------------------------------------------------------------

size_t mixture_memory(void) { return sizeof(Mixture); }

Mixture *mixture_open(bool network) {
    Mixture *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    make_tables();
    start_mixture(m, network);
    return m;
}

void mixture_begin(Mixture *m, const uint32_t *tree) {
    int best = V, tenths;
    m->tree = tree;
    for (int n = V; tree && n < 2 * V; n++)
        if (tree[n] > tree[best]) best = n;
    m->likeliest = best - V;
    tenths = tree ? (int)(10 * (uint64_t)tree[best] / tree[1]) : 0;
    m->sure = 1 + (tenths >= 3) + (tenths >= 6) + (tenths >= 9);
    m->now.node = 1;
    m->now.bits = 0;
    predict(m, &m->now, true);
}

int mixture_bit(const Mixture *m) { return m->now.p; }

void mixture_tell(Mixture *m, int bit) {
    learn(m, bit);
    m->now.node = 2 * m->now.node + bit;
    if (++m->now.bits == 8)
        read_byte(m, m->now.node - V);
    else
        predict(m, &m->now, true);
}

static void split(Mixture *m, Now now, uint32_t mass, uint32_t *freq) {
    if (now.bits == 8) {
        freq[now.node - V] = mass;
        return;
    }
    predict(m, &now, false);
    uint32_t ones = mass_of_one(mass, now.p, 128u >> now.bits);
    now.bits++;
    now.node *= 2;
    split(m, now, mass - ones, freq);
    now.node++;
    split(m, now, ones, freq);
}

void mixture_bytes(Mixture *m, uint32_t freq[V]) { split(m, m->now, ONE_BYTE, freq); }

void mixture_join(Mixture *m) {
    // What was learnt without the network is where all that depends on it begins.
    int32_t(*w)[WIDTH] = m->weights + BY_ORDER;
    for (int i = 1; i < NETWORK_STEPS; i++) memcpy(w[i * BY_NETWORK], w[0], BY_NETWORK * sizeof *w);
    w += BY_NETWORK * NETWORK_STEPS;
    for (int i = 1; i < SURE_STEPS; i++) memcpy(w[i * BY_MATCH], w[0], BY_MATCH * sizeof *w);
    for (int i = 0; i < ROWS; i++) m->weights[i][OF_NETWORK] = ONE_BIT * 46 / 100;
    start_apm(m->apm[1]);
    m->seen = 0;
}
