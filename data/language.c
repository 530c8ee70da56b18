// language.c: writes text in an invented language, and knows its entropy to the last digit.
//
// Words are prefix + root + suffix (un-drusk-ly, out-slint-ed); a grammar of thirty states
// strings them into sentences, and the subject's number decides the verb's ending. All chances are
// whole numbers over a power of two, so the text is the same on every machine. It refuses to guess:
// a text that the grammar cannot make has no cost (NaN). Read GRAMMAR first, then expectation().
//
//     gcc -std=c11 -O2 -DLANGUAGE_MAIN data/language.c -lm -o data/language
//     ./data/language --bytes 1000000 --seed 1 > train.txt
#include "language.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------------------------------------
// The language. Everything the text can say is in this section.

enum category {
    NOUN_SG, NOUN_PL, VERB_S, VERB_0, VERB_ED, VERB_ING, ADJ, UN_ADJ, ADVERB,
    THE, DET_SG, AN, DET_PL, PRO_SG, PRO_PL, PRO_OBJ, BE_SG, BE_PL, MODAL, OF, PREP, CONJ,
    COMMA, STOP, ASK, CATEGORIES
};

static const char *const CATEGORY_NAME[CATEGORIES] = {
    "noun.sg", "noun.pl", "verb.s", "verb.0", "verb.ed", "verb.ing", "adj", "adj.un", "adverb",
    "the", "det.sg", "an", "det.pl", "pro.sg", "pro.pl", "pro.obj", "be.sg", "be.pl", "modal", "of",
    "prep", "conj", "comma", "stop", "ask"
};

// Roots, the most frequent first. They begin with a consonant, so that "a" never has to be "an",
// and end in a way that takes every suffix without a change of spelling.
static const char NOUNS[] =
    "brosk plark wharl thrane gorn skell mave dorrin wessel fenlow brindel pellow callop murden "
    "hobbin lorrel grennet tolver vennock marlet cordle bramlin fendle gosket harbel jorrow "
    "kessen lantle mindow nallet porrin quennel rundle sorrick tibbon yarrin zembel crindle "
    "drommet flarrow glimmock prandle stellow trinnet blenner chorrel shandle thimlet whistow "
    "clodder dappen gurdle hemlin jandle kirrow lodden mospel nurrick pindle rasket seldow "
    "tormel vardle corvin";
static const char VERBS[] =
    "slint gorm wrask plend trimp fesk drond glomp harl jolm kesk lorm mulk nemp pruld quisk "
    "rolk skend snarp spolt stilk swond tarf thrand twilt vesp wulk yolm zarn brelt clunt cromp "
    "flisk grend plolt shrand smulk trosk whemp chorl dwelk blurk";
static const char ADJECTIVES[] =
    "drusk morl trilk grisp solf blenk crelt dimp flimp glaum hosk jelk lirm mald narp plisp "
    "rusp sild tolf vark wolm yesk brolt chelk dront fimp glesk strolm";

// How the words of each category are built. A recipe is drawn with chance weight / RECIPE_ONE among
// those of its category, then a root of its list with the chance zipf(). Marks are words as well: a
// sentence ends with a stop and the blank, or the end of the line, that parts it from the next.
enum { RECIPE_ONE = 16, ROOT_ONE = 1 << 16, FORM_ONE = RECIPE_ONE * ROOT_ONE };

static const struct recipe {
    enum category category;
    const char *prefix, *roots, *suffix;
    uint32_t weight;
} RECIPES[] = {
    {NOUN_SG,  "",    NOUNS,      "",      12}, {NOUN_SG,  "",    VERBS,      "er",    2},
    {NOUN_SG,  "",    ADJECTIVES, "ness",   2},
    {NOUN_PL,  "",    NOUNS,      "s",     13}, {NOUN_PL,  "",    VERBS,      "ers",   3},
    {VERB_S,   "",    VERBS,      "s",     13}, {VERB_S,   "re",  VERBS,      "s",     2},
    {VERB_S,   "out", VERBS,      "s",      1},
    {VERB_0,   "",    VERBS,      "",      13}, {VERB_0,   "re",  VERBS,      "",      2},
    {VERB_0,   "out", VERBS,      "",       1},
    {VERB_ED,  "",    VERBS,      "ed",    13}, {VERB_ED,  "re",  VERBS,      "ed",    2},
    {VERB_ED,  "out", VERBS,      "ed",     1},
    {VERB_ING, "",    VERBS,      "ing",   14}, {VERB_ING, "re",  VERBS,      "ing",   2},
    {ADJ,      "",    ADJECTIVES, "",      13}, {ADJ,      "",    ADJECTIVES, "er",    2},
    {ADJ,      "",    ADJECTIVES, "est",    1}, {UN_ADJ,   "un",  ADJECTIVES, "",     16},
    {ADVERB,   "",    ADJECTIVES, "ly",    13}, {ADVERB,   "un",  ADJECTIVES, "ly",    3},
    {THE,      "",    "the",      "",      16}, {AN,       "",    "an",       "",     16},
    {DET_SG,   "",    "a",        "",       9}, {DET_SG, "", "this each one every", "", 7},
    {DET_PL,   "", "some these many most few", "",    16}, {OF, "", "of", "", 16},
    {PRO_SG,   "", "she he it", "",                   16}, {PRO_PL, "", "they we you", "", 16},
    {PRO_OBJ,  "", "them her him us me", "",          16},
    {BE_SG,    "", "was is", "",                      16}, {BE_PL, "", "were are", "", 16},
    {MODAL,    "", "will can did must may", "",       16},
    {PREP,     "", "in with by under near from over past", "", 16},
    {CONJ,     "", "and but so yet", "",              16},
    {COMMA, "", ",", "", 16}, {ASK,  "", "?", " ", 13}, {ASK,  "", "?", "\n", 3},
    {STOP, "", ".", " ", 11}, {STOP, "", ".", "\n", 3}, {STOP, "", "!", " ",  2},
};

// The grammar: in each state, the arcs that may be taken, with chance weight / ARC_ONE. A category
// stands at most once in a state, and no word in two categories, so the next word of the text tells
// which arc was taken: state and text determine the next state. After S_ the noun phrase is a
// subject, after O_ an object; _SG and _PL is the number it has to have, _ANY leaves it open.
// An arc to START ends the sentence.
enum state {
    START, LEAD, CLAUSE, S_ANY, S_SG, S_AN, S_PL, HEAD_SG, HEAD_PL, OF_SG, OF_PL, OF_THE_SG,
    OF_THE_PL, V_SG, V_PL, INFINITIVE, PREDICATE, OBJECT, O_ANY, O_SG, O_AN, O_PL, NOUN_OBJ, TAIL,
    JOIN, Q, Q_THE, Q_VERB, Q_TAIL, Q_END, STATES
};
enum { ARC_ONE = 32, ARCS = 9 };

static const struct arc {
    unsigned char weight, category, next;
} GRAMMAR[STATES][ARCS] = {
    [START]      = {{10, THE, S_ANY}, {5, DET_SG, S_SG}, {1, AN, S_AN}, {4, DET_PL, S_PL},
                    {4, PRO_SG, V_SG}, {3, PRO_PL, V_PL}, {2, ADVERB, LEAD}, {1, CONJ, CLAUSE},
                    {2, MODAL, Q}},
    [LEAD]       = {{32, COMMA, CLAUSE}},
    [CLAUSE]     = {{12, THE, S_ANY}, {5, DET_SG, S_SG}, {1, AN, S_AN}, {4, DET_PL, S_PL},
                    {6, PRO_SG, V_SG}, {4, PRO_PL, V_PL}},
    [S_ANY]      = {{6, ADJ, S_ANY}, {2, UN_ADJ, S_ANY}, {15, NOUN_SG, HEAD_SG},
                    {9, NOUN_PL, HEAD_PL}},
    [S_SG]       = {{8, ADJ, S_SG}, {24, NOUN_SG, HEAD_SG}},
    [S_AN]       = {{32, UN_ADJ, S_SG}},
    [S_PL]       = {{6, ADJ, S_PL}, {2, UN_ADJ, S_PL}, {24, NOUN_PL, HEAD_PL}},
    [HEAD_SG]    = {{4, OF, OF_SG}, {9, VERB_S, NOUN_OBJ}, {10, VERB_ED, NOUN_OBJ},
                    {5, BE_SG, PREDICATE}, {3, MODAL, INFINITIVE}, {1, ADVERB, V_SG}},
    [HEAD_PL]    = {{4, OF, OF_PL}, {9, VERB_0, NOUN_OBJ}, {10, VERB_ED, NOUN_OBJ},
                    {5, BE_PL, PREDICATE}, {3, MODAL, INFINITIVE}, {1, ADVERB, V_PL}},
    [OF_SG]      = {{24, THE, OF_THE_SG}, {8, NOUN_PL, V_SG}},
    [OF_PL]      = {{24, THE, OF_THE_PL}, {8, NOUN_PL, V_PL}},
    [OF_THE_SG]  = {{20, NOUN_SG, V_SG}, {12, NOUN_PL, V_SG}},
    [OF_THE_PL]  = {{20, NOUN_SG, V_PL}, {12, NOUN_PL, V_PL}},
    [V_SG]       = {{11, VERB_S, NOUN_OBJ}, {12, VERB_ED, NOUN_OBJ}, {5, BE_SG, PREDICATE},
                    {4, MODAL, INFINITIVE}},
    [V_PL]       = {{11, VERB_0, NOUN_OBJ}, {12, VERB_ED, NOUN_OBJ}, {5, BE_PL, PREDICATE},
                    {4, MODAL, INFINITIVE}},
    [INFINITIVE] = {{32, VERB_0, NOUN_OBJ}},
    [PREDICATE]  = {{13, ADJ, TAIL}, {5, UN_ADJ, TAIL}, {12, VERB_ING, NOUN_OBJ},
                    {2, PREP, OBJECT}},
    [NOUN_OBJ]   = {{8, THE, O_ANY}, {3, DET_SG, O_SG}, {1, AN, O_AN}, {3, DET_PL, O_PL},
                    {3, PRO_OBJ, TAIL}, {5, PREP, OBJECT}, {3, ADVERB, TAIL}, {5, STOP, START},
                    {1, COMMA, JOIN}},
    [OBJECT]     = {{15, THE, O_ANY}, {7, DET_SG, O_SG}, {1, AN, O_AN}, {6, DET_PL, O_PL},
                    {3, PRO_OBJ, TAIL}},
    [O_ANY]      = {{6, ADJ, O_ANY}, {2, UN_ADJ, O_ANY}, {15, NOUN_SG, TAIL}, {9, NOUN_PL, TAIL}},
    [O_SG]       = {{8, ADJ, O_SG}, {24, NOUN_SG, TAIL}},
    [O_AN]       = {{32, UN_ADJ, O_SG}},
    [O_PL]       = {{6, ADJ, O_PL}, {2, UN_ADJ, O_PL}, {24, NOUN_PL, TAIL}},
    [TAIL]       = {{20, STOP, START}, {5, COMMA, JOIN}, {7, PREP, OBJECT}},
    [JOIN]       = {{32, CONJ, CLAUSE}},
    [Q]          = {{16, THE, Q_THE}, {8, PRO_SG, Q_VERB}, {8, PRO_PL, Q_VERB}},
    [Q_THE]      = {{20, NOUN_SG, Q_VERB}, {12, NOUN_PL, Q_VERB}},
    [Q_VERB]     = {{32, VERB_0, Q_TAIL}},
    [Q_TAIL]     = {{16, ASK, START}, {12, PRO_OBJ, Q_END}, {4, ADVERB, Q_END}},
    [Q_END]      = {{32, ASK, START}},
};

// ------------------------------------------------------------------------------------------------
// The lexicon: every word that can be written, with its chance within its category.

enum { FORMS_MAX = 2048, TEXT_MAX = 24, SPELLING_MAX = TEXT_MAX + 1, ZIPF_OFFSET = 8 };

static struct form {
    char text[TEXT_MAX], root[TEXT_MAX];
    enum category category;
    uint32_t weight;                    // chance within the category, in FORM_ONE-ths
} forms[FORMS_MAX];
static int first_form[CATEGORIES + 1];  // forms of category c: first_form[c] <= i < first_form[c+1]

// The chance of the root of this rank among n, in ROOT_ONE-ths: proportional to 1/(rank + offset),
// rounded down, and rank 0 gets what the rounding left.
static uint32_t zipf(int rank, int n)
{
    const uint64_t scale = 1u << 24;
    uint64_t total = 0;
    uint32_t rest = ROOT_ONE;
    for (int i = 0; i < n; i++) {
        total += scale / (uint64_t)(i + ZIPF_OFFSET);
    }
    if (rank > 0) {
        return (uint32_t)(ROOT_ONE * (scale / (uint64_t)(rank + ZIPF_OFFSET)) / total);
    }
    for (int i = 1; i < n; i++) {
        rest -= zipf(i, n);
    }
    return rest;
}

// Appends the forms of one recipe at forms[count]; returns the new count. A table that outgrew its
// limits is a mistake in this file, so it stops the program.
static int add_recipe(const struct recipe *r, int count)
{
    int n = 1, rank = 0;
    for (const char *c = r->roots; *c; c++) {
        n += *c == ' ';
    }
    for (const char *root = r->roots; rank < n; rank++) {
        const int length = (int)strcspn(root, " ");
        const size_t room = TEXT_MAX - strlen(r->prefix) - strlen(r->suffix);
        if (count == FORMS_MAX || (size_t)length >= room) {
            fprintf(stderr, "language.c: no room for the word '%.*s'\n", length, root);
            abort();
        }
        struct form *f = &forms[count++];
        snprintf(f->root, sizeof f->root, "%.*s", length, root);
        snprintf(f->text, sizeof f->text, "%s%.*s%s", r->prefix, length, root, r->suffix);
        f->category = r->category;
        f->weight = r->weight * zipf(rank, n);
        root += length + (root[length] == ' ');
    }
    return count;
}

static void build_lexicon(void)
{
    if (first_form[CATEGORIES]) {
        return;
    }
    int count = 0;
    for (int c = 0; c < CATEGORIES; c++) {
        first_form[c] = count;
        for (size_t r = 0; r < sizeof RECIPES / sizeof RECIPES[0]; r++) {
            if (RECIPES[r].category == (enum category)c) {
                count = add_recipe(&RECIPES[r], count);
            }
        }
    }
    first_form[CATEGORIES] = count;
}

static int is_word(const struct form *f)
{
    return f->text[0] >= 'a' && f->text[0] <= 'z';
}

// How the form is spelt in this state: a word opens a sentence with a capital, elsewhere a blank
// stands before it; a mark follows directly. Returns the length.
static int spell(enum state s, const struct form *f, char spelling[SPELLING_MAX])
{
    const int blank = is_word(f) && s != START;
    spelling[0] = ' ';
    strcpy(spelling + blank, f->text);
    if (s == START && is_word(f)) {
        spelling[0] = (char)(spelling[0] - 'a' + 'A');
    }
    return blank + (int)strlen(f->text);
}

static void write_root(FILE *roots, uint64_t offset, const char *word, const struct form *f)
{
    fprintf(roots, "%llu\t%s\t%s\t%s\n", (unsigned long long)offset, word, f->root,
            CATEGORY_NAME[f->category]);
}

// ------------------------------------------------------------------------------------------------
// The generator.

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11): scrambles a 128-bit counter under a 64-bit key into four independent 32-bit draws. Draw
// number i needs no state but i, which is what makes the text the same everywhere.
static void philox(const uint32_t counter[4], uint64_t key, uint32_t out[4])
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    memcpy(out, counter, 4 * sizeof out[0]);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * out[0], b = (uint64_t)0xCD9E8D57u * out[2];
        out[0] = (uint32_t)(b >> 32) ^ out[1] ^ k0;
        out[1] = (uint32_t)b;
        out[2] = (uint32_t)(a >> 32) ^ out[3] ^ k1;
        out[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

struct stream {
    uint64_t seed, size;                // size: bytes that the whole text will have
    uint64_t token, offset;             // of the next token
    enum state state;
    char spelling[SPELLING_MAX];    // of the token at hand
    int length, used;                   // its bytes, and how many of them are already written
};

// Draws the next token: one number picks the arc, another the word. ARC_ONE and FORM_ONE are powers
// of two, so a draw cut down to that many values favours none of them.
static void next_token(struct stream *st, FILE *roots)
{
    const uint32_t counter[4] = {(uint32_t)st->token, (uint32_t)(st->token >> 32), 0, 0};
    uint32_t draw[4];
    philox(counter, st->seed, draw);
    st->token++;

    const struct arc *a = GRAMMAR[st->state];
    uint32_t left = draw[0] % ARC_ONE;
    for (; left >= a->weight; a++) {
        left -= a->weight;
    }
    const struct form *f = &forms[first_form[a->category]];
    left = draw[1] % FORM_ONE;
    for (; left >= f->weight; f++) {
        left -= f->weight;
    }
    st->length = spell(st->state, f, st->spelling);
    st->used = 0;
    st->offset += (uint64_t)st->length;
    if (roots && is_word(f) && st->offset <= st->size) {
        const size_t word = strlen(f->text);
        write_root(roots, st->offset - word, st->spelling + st->length - word, f);
    }
    st->state = (enum state)a->next;
}

// Writes the next n bytes of the text.
static void continue_text(struct stream *st, unsigned char *out, size_t n, FILE *roots)
{
    for (size_t i = 0; i < n; i++) {
        if (st->used == st->length) {
            next_token(st, roots);
        }
        out[i] = (unsigned char)st->spelling[st->used++];
    }
}

size_t language_write(unsigned char *out, size_t bytes, uint64_t seed, FILE *roots)
{
    struct stream st = {.seed = seed, .size = bytes, .state = START};
    build_lexicon();
    continue_text(&st, out, bytes, roots);
    return bytes;
}

// ------------------------------------------------------------------------------------------------
// The floor.
//
// A text has one derivation only (see GRAMMAR), so its probability is the product of the chances of
// the choices in it. Sentences are independent draws from one distribution, and their ends can be
// read off the text; by the law of large numbers, numerator and denominator each over the number of
// sentences, the bits per byte of a long text tend to
//
//     floor = E[bits of a sentence] / E[bytes of a sentence].
//
// Both expectations are sums over the tokens of a sentence, k = 0, 1, ..., and the states:
//
//     E[x of a sentence] = sum_k sum_s P(token k exists, drawn in state s) * E[x of a token | s]
//
// The P are a vector, START at k = 0, multiplied once per k by the matrix of the arcs; an arc back
// to START leaves the sum. What is left alive shrinks at least geometrically, and we add until it
// is below 1e-30, far under the last bit of a double.

struct sentence { double bits, bytes; };

// E[bits] and E[bytes] of the one token drawn in state s.
static struct sentence token_expectation(enum state s)
{
    struct sentence e = {0, 0};
    for (const struct arc *a = GRAMMAR[s]; a < GRAMMAR[s] + ARCS && a->weight; a++) {
        for (int i = first_form[a->category]; i < first_form[a->category + 1]; i++) {
            char spelling[SPELLING_MAX];
            const double p = (double)a->weight / ARC_ONE * forms[i].weight / FORM_ONE;
            e.bits  -= p * log2(p);
            e.bytes += p * spell(s, &forms[i], spelling);
        }
    }
    return e;
}

static struct sentence expectation(void)
{
    struct sentence total = {0, 0}, token[STATES];
    double alive[STATES] = {[START] = 1}, left = 1;
    build_lexicon();
    for (int s = 0; s < STATES; s++) {
        token[s] = token_expectation((enum state)s);
    }
    while (left > 1e-30) {
        double next[STATES] = {0};
        left = 0;
        for (int s = 0; s < STATES; s++) {
            total.bits  += alive[s] * token[s].bits;
            total.bytes += alive[s] * token[s].bytes;
            for (int a = 0; a < ARCS; a++) {
                next[GRAMMAR[s][a].next] += alive[s] * GRAMMAR[s][a].weight / ARC_ONE;
            }
        }
        next[START] = 0;                // that sentence is over
        for (int s = 0; s < STATES; s++) {
            left += alive[s] = next[s];
        }
    }
    return total;
}

double language_entropy(void)
{
    const struct sentence e = expectation();
    return e.bits / e.bytes;
}

// ------------------------------------------------------------------------------------------------
// The ideal coder: knows the grammar and the lexicon, and reads nothing but the text.

// Finds the arc and the form that spell text[0..n) in state s. Returns the length of the spelling,
// which is more than n where the text stops within it; 0 if nothing fits.
static int match(enum state s, const unsigned char *text, size_t n, const struct arc **arc,
                 const struct form **form)
{
    const int at_word = s != START && text[0] == ' ';       // where a word's first letter is
    for (const struct arc *a = GRAMMAR[s]; a < GRAMMAR[s] + ARCS && a->weight; a++) {
        for (int i = first_form[a->category]; i < first_form[a->category + 1]; i++) {
            char spelling[SPELLING_MAX];
            if (s != START && n > 1 && text[at_word] != (unsigned char)forms[i].text[0]) {
                continue;                                   // only saves time
            }
            const size_t length = (size_t)spell(s, &forms[i], spelling);
            if (memcmp(text, spelling, length < n ? length : n)) {
                continue;
            }
            if (is_word(&forms[i]) && length < n && text[length] >= 'a' && text[length] <= 'z') {
                continue;                                   // the beginning of a longer word
            }
            *arc = a;
            *form = &forms[i];
            return (int)length;
        }
    }
    return 0;
}

struct tally {                          // sums over the complete sentences of a text
    double count, bits, bytes, bits_bits, bits_bytes, bytes_bytes;
};

// Parses text and sums up its sentences. Words that something follows go to roots, if it is not
// NULL. Returns 0, or -1 where the language cannot go on as the text does.
static int parse(const unsigned char *text, size_t n, struct tally *t, FILE *roots)
{
    enum state s = START;
    struct sentence now = {0, 0};
    *t = (struct tally){0};
    build_lexicon();
    for (size_t at = 0; at < n;) {
        const struct arc *a;
        const struct form *f;
        const size_t length = (size_t)match(s, text + at, n - at, &a, &f);
        if (length == 0) {
            return -1;
        }
        if (length > n - at) {
            return 0;                   // cut off within a word
        }
        at += length;
        if (roots && is_word(f) && at < n) {
            char spelling[SPELLING_MAX];
            const size_t word = strlen(f->text);
            write_root(roots, at - word, spelling + spell(s, f, spelling) - word, f);
        }
        now.bits += log2(ARC_ONE / (double)a->weight) + log2(FORM_ONE / (double)f->weight);
        now.bytes += (double)length;
        s = (enum state)a->next;
        if (s == START) {
            t->count       += 1;
            t->bits        += now.bits;
            t->bytes       += now.bytes;
            t->bits_bits   += now.bits * now.bits;
            t->bits_bytes  += now.bits * now.bytes;
            t->bytes_bytes += now.bytes * now.bytes;
            now = (struct sentence){0, 0};
        }
    }
    return 0;
}

double language_cost(const unsigned char *text, size_t n)
{
    struct tally t;
    return parse(text, n, &t, NULL) == 0 && t.count > 0 ? t.bits / t.bytes : NAN;
}

// ------------------------------------------------------------------------------------------------
// The self-test.

struct report { FILE *out; int passed, failed, skipped; };

static void check(struct report *r, int ok, const char *what)
{
    fprintf(r->out, "%s %s\n", ok ? "ok  " : "FAIL", what);
    *(ok ? &r->passed : &r->failed) += 1;
}

// The published known answers of Philox4x32-10 (kat_vectors of Random123, the authors' own code).
static void test_philox(struct report *r)
{
    static const struct { uint32_t counter[4]; uint64_t key; uint32_t out[4]; } known[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff,
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    int ok = 1;
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        philox(known[i].counter, known[i].key, out);
        ok &= memcmp(out, known[i].out, sizeof out) == 0;
    }
    check(r, ok, "philox4x32-10 gives the three published known answers");
}

// One derivation per text: words are told apart by their letters (small ones, so that a capital can
// be undone) and end where the letters end; no mark begins another, or with a blank; no state has
// two arcs alike.
static void test_unambiguous(struct report *r)
{
    const int count = first_form[CATEGORIES];
    int alike = 0, odd = 0, twice = 0;
    for (int i = 0; i < count; i++) {
        const char *text = forms[i].text;
        odd += is_word(&forms[i]) && strspn(text, "abcdefghijklmnopqrstuvwxyz") != strlen(text);
        odd += text[0] == ' ';
        for (int j = 0; j < count; j++) {
            const size_t shorter = strlen(text) + (size_t)is_word(&forms[i]);
            alike += i != j && strncmp(text, forms[j].text, shorter) == 0;
        }
    }
    for (int s = 0; s < STATES; s++) {
        for (int a = 0; a < ARCS; a++) {
            for (int b = 0; b < a && GRAMMAR[s][a].weight; b++) {
                twice += GRAMMAR[s][a].category == GRAMMAR[s][b].category;
            }
        }
    }
    char what[96];
    snprintf(what, sizeof what, "all %d surface forms differ, by letters alone", count);
    check(r, count > 0 && alike == 0 && odd == 0, what);
    check(r, twice == 0, "the next word determines the arc in every state");
}

static void test_sums(struct report *r)
{
    int bad_states = 0, bad_categories = 0;
    for (int s = 0; s < STATES; s++) {
        int sum = 0;
        for (int a = 0; a < ARCS; a++) {
            sum += GRAMMAR[s][a].weight;
        }
        bad_states += sum != ARC_ONE;
    }
    for (int c = 0; c < CATEGORIES; c++) {
        uint64_t sum = 0;
        for (int i = first_form[c]; i < first_form[c + 1]; i++) {
            sum += forms[i].weight;
            bad_categories += forms[i].weight == 0;
        }
        bad_categories += sum != FORM_ONE;
    }
    check(r, bad_states == 0, "the chances of the arcs sum to one in every state");
    check(r, bad_categories == 0, "the chances of the words sum to one in every category");
}

static void test_seeds(struct report *r, unsigned char *text, size_t n)
{
    unsigned char *other = text + n / 2;
    const size_t half = n / 2;
    uint64_t hash = 0xcbf29ce484222325;             // FNV-1a
    language_write(text, half, 1, NULL);
    for (size_t i = 0; i < half; i++) {
        hash = (hash ^ text[i]) * 0x100000001b3;
    }
    check(r, hash == 0x74f7e44aa7d0b961, "seed 1 gives the bytes it gave where this was written");
    language_write(other, half, 1, NULL);
    check(r, memcmp(text, other, half) == 0, "the same seed gives the same bytes");
    language_write(other, half / 3, 1, NULL);
    check(r, memcmp(text, other, half / 3) == 0, "a shorter text begins the longer one");
    language_write(other, half, 2, NULL);
    check(r, memcmp(text, other, 200) != 0, "another seed gives other bytes");
    language_write(other, half, 1 + ((uint64_t)1 << 32), NULL);
    check(r, memcmp(text, other, 200) != 0, "the upper half of the seed counts");
}

// Is the mean bits per byte of the sample compatible with the floor h? The residuals
// bits_i - h * bytes_i of the sentences are independent, and of mean zero if h is the floor; so
// their sum stays within 4 standard deviations but for one sample in 16000. The deviation is taken
// from the sample's own spread.
static int compatible(const struct tally *t, double h)
{
    const double squares = t->bits_bits - 2 * h * t->bits_bytes + h * h * t->bytes_bytes;
    return t->count > 1000 && fabs(t->bits - h * t->bytes) <= 4 * sqrt(squares);
}

static void test_floor(struct report *r, unsigned char *text, size_t n)
{
    const double h = language_entropy(), bytes = expectation().bytes;
    for (int seed = 1; seed <= 4; seed++) {
        struct tally t;
        char what[128];
        language_write(text, n, (uint64_t)seed, NULL);
        const int parsed = parse(text, n, &t, NULL) == 0 &&
                           fabs(language_cost(text, n) - t.bits / t.bytes) <= 1e-12;
        const double spread = sqrt(t.bytes_bytes - t.bytes * t.bytes / t.count);
        snprintf(what, sizeof what,
                 "seed %d, %.0f sentences: ideal coder %.6f, floor %.6f bits/byte",
                 seed, t.count, t.bits / t.bytes, h);
        check(r, parsed && compatible(&t, h), what);
        check(r, parsed && !compatible(&t, h * 1.01) && !compatible(&t, h * 0.99),
              "    a floor 1 % higher or lower would have been noticed");
        snprintf(what, sizeof what, "    a sentence has %.3f bytes, expected %.3f",
                 t.bytes / t.count, bytes);
        check(r, fabs(t.bytes - t.count * bytes) <= 4 * spread, what);
    }
}

// The lines that the parser derives from the text alone are those that the generator wrote, and
// each word stands where its line says. The generator may know of one word more: the one whose last
// letter ends the text.
static void test_roots(struct report *r, unsigned char *text, size_t n)
{
    FILE *made = tmpfile(), *read = tmpfile();
    if (made && read) {
        char a[128] = "", b[128];
        long lines = 0, more = 0;
        struct tally t;
        language_write(text, n, 5, made);
        int same = parse(text, n, &t, read) == 0, placed = 1;
        rewind(made);
        rewind(read);
        for (; fgets(b, sizeof b, read); lines++) {
            const size_t at = (size_t)strtoul(b, NULL, 10), word = strcspn(b, "\t") + 1;
            same &= fgets(a, sizeof a, made) && strcmp(a, b) == 0;
            placed &= at < n && memcmp(text + at, b + word, strcspn(b + word, "\t")) == 0;
        }
        while (fgets(a, sizeof a, made)) {
            more++;
        }
        check(r, same && more <= 1 && lines > (long)(n / 20), "the parser finds the same roots");
        check(r, placed && lines > 0, "every word stands in the text where its line says");
    } else {
        fprintf(r->out, "skip the roots (two checks): no temporary file\n");
        r->skipped += 2;
    }
    if (made) {
        fclose(made);
    }
    if (read) {
        fclose(read);
    }
}

static double cost_of(const char *text)
{
    return language_cost((const unsigned char *)text, strlen(text));
}

static void test_refusals(struct report *r)
{
    static const char *const pairs[][2] = {         // of the language, and just not
        {"The brosk slints. ", "The brosk slint. "}, {"They slint. ", "They slints. "},
        {"These brosks of the plark gorm.\n", "These brosks of the plark gorms.\n"},
        {"An undrusk brosk gorms! ", "An drusk brosk gorms! "},
        {"Can she gorm? ", "Can she gorm. "}, {"She gormed us. ", "she gormed us. "},
        {"We outslint. ", "We overslint. "}, {"Druskly, we gorm. ", "Druskly we gorm. "},
    };
    enum { N = 2000 };
    unsigned char text[N];
    int ok = 1;
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        ok &= isfinite(cost_of(pairs[i][0])) && isnan(cost_of(pairs[i][1]));
    }
    check(r, ok, "the coder takes what the grammar makes and refuses what it nearly makes");
    language_write(text, N, 6, NULL);
    ok = 1;
    for (int i = 0; i < N; i++) {
        const unsigned char kept = text[i];
        text[i] = '#';
        ok &= isnan(language_cost(text, N));
        text[i] = kept;
    }
    check(r, ok, "one foreign byte, wherever it is, gives NaN");
    ok = isnan(language_cost(text, 0));
    for (size_t n = 500; n <= N; n++) {
        ok &= isfinite(language_cost(text, n));
    }
    check(r, ok, "a text may stop at any byte, and an empty one has no cost");
}

// The states in which the language may be after a token, if it was in one of the given states (bits
// of a set) before. A capital shows that the token opened a sentence.
static uint32_t follow(uint32_t states, enum category c, int capital)
{
    uint32_t next = 0;
    for (int s = 0; s < STATES; s++) {
        for (int a = 0; a < ARCS && (states >> s & 1) && (s == START) == capital; a++) {
            if (GRAMMAR[s][a].weight && GRAMMAR[s][a].category == c) {
                next |= (uint32_t)1 << GRAMMAR[s][a].next;
            }
        }
    }
    return next;
}

// A model that sees 43 bytes can come near the floor only if these tell it the state. So for every
// token we forget all but the 43 bytes before its last one, allow every state where they begin, and
// let the whole tokens among them rule states out.
static void test_reach(struct report *r, unsigned char *text, size_t n)
{
    enum { SEES = 43, KEPT = 64 };                  // 43 bytes never hold 64 tokens
    struct { size_t start; enum category category; int capital; } past[KEPT] = {{0, THE, 0}};
    const struct arc *a;
    const struct form *f;
    size_t tokens = 0, known = 0, length = 0;
    enum state s = START;
    language_write(text, n, 7, NULL);
    for (size_t at = 0; at < n; at += length, tokens++) {
        length = (size_t)match(s, text + at, n - at, &a, &f);
        if (length == 0 || length > n - at) {
            break;
        }
        uint32_t states = ((uint32_t)1 << STATES) - 1;
        for (size_t j = tokens < KEPT ? 0 : tokens - KEPT; j < tokens; j++) {
            if (past[j % KEPT].start + SEES >= at + length - 1) {
                states = follow(states, past[j % KEPT].category, past[j % KEPT].capital);
            }
        }
        known += states == (uint32_t)1 << s;
        past[tokens % KEPT].start = at;
        past[tokens % KEPT].category = f->category;
        past[tokens % KEPT].capital = s == START;
        s = (enum state)a->next;
    }
    char what[96];
    snprintf(what, sizeof what, "the last %d bytes tell the state for %.2f %% of the tokens", SEES,
             100.0 * (double)known / (double)tokens);
    check(r, tokens > n / 20 && known >= 0.99 * (double)tokens, what);
}

int language_self_test(FILE *out)
{
    const size_t n = 2000000;
    struct report r = {out, 0, 0, 0};
    unsigned char *text = malloc(n);
    build_lexicon();
    check(&r, text != NULL, "memory for the sample");
    test_unambiguous(&r);
    test_sums(&r);
    if (r.failed) {                     // a draw could run off a table that does not sum to one
        fprintf(out, "skip all checks of the text: what is wrong above comes first\n");
        r.skipped++;
    } else {
        test_philox(&r);
        test_seeds(&r, text, n);
        test_floor(&r, text, n);
        test_roots(&r, text, 100000);
        test_refusals(&r);
        test_reach(&r, text, 500000);
    }
    free(text);
    fprintf(out, "%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped);
    return r.failed;
}

// ------------------------------------------------------------------------------------------------
// The program.

#ifdef LANGUAGE_MAIN
#include <errno.h>
#include <signal.h>

static const char USAGE[] =
    "usage: language [--bytes N] [--seed N] [--roots FILE]    write text to standard output\n"
    "       language --entropy | --test | --help\n"
    "  --bytes N     length of the text, 1 to 1000000000000000 (1000000)\n"
    "  --seed N      which text of the language, 0 to 18446744073709551615 (1)\n"
    "  --roots FILE  also write a line per word: byte offset, word, root, category, tabs between\n"
    "  --entropy     print the entropy of the language in bits per byte, and stop\n"
    "  --test        run the self-test\n";

// Reads a whole number from low to high, all digits. Says what is wrong and returns 0 if it is not.
static int read_number(const char *option, const char *value, uint64_t low, uint64_t high,
                       uint64_t *number)
{
    char *end = NULL;
    errno = 0;
    const unsigned long long v = value[0] >= '0' && value[0] <= '9' ? strtoull(value, &end, 10) : 0;
    if (end == NULL || *end || errno || v < low || v > high) {
        fprintf(stderr, "language: %s '%s': expected a whole number from %llu to %llu\n", option,
                value, (unsigned long long)low, (unsigned long long)high);
        return 0;
    }
    *number = v;
    return 1;
}

// Streams the text, so that it may be larger than memory. Returns the exit status.
static int write_text(uint64_t bytes, uint64_t seed, const char *roots_path)
{
    static unsigned char piece[1 << 16];
    struct stream st = {.seed = seed, .size = bytes, .state = START};
    FILE *roots = roots_path ? fopen(roots_path, "w") : NULL;
    if (roots_path && !roots) {
        fprintf(stderr, "language: cannot write '%s': %s\n", roots_path, strerror(errno));
        return 1;
    }
    build_lexicon();
    int text_ok = 1, roots_ok = 1, why = 0;
    for (uint64_t done = 0; done < bytes && text_ok && roots_ok; done += sizeof piece) {
        const size_t n = bytes - done < sizeof piece ? (size_t)(bytes - done) : sizeof piece;
        continue_text(&st, piece, n, roots);
        roots_ok = !roots || !ferror(roots);
        text_ok = fwrite(piece, 1, n, stdout) == n && (done + n < bytes || fflush(stdout) == 0);
        why = errno;
    }
    if (roots && fclose(roots)) {
        roots_ok = 0;
    }
    if (!roots_ok) {
        fprintf(stderr, "language: could not write all of '%s'\n", roots_path);
        return 1;
    }
#ifdef EPIPE
    if (!text_ok && why == EPIPE) {
        return 0;                       // the reader had enough, as in language | head
    }
#endif
    if (!text_ok) {
        fprintf(stderr, "language: could not write the text: %s\n", strerror(why));
    }
    return !text_ok;
}

// Options that stand alone. Returns the exit status, or -1 if it is none of them.
static int run_alone(const char *option)
{
    int failed = 0;
    if (strcmp(option, "--help") == 0) {
        fputs(USAGE, stdout);
    } else if (strcmp(option, "--entropy") == 0) {
        printf("%.12f\n", language_entropy());
    } else if (strcmp(option, "--test") == 0) {
        failed = language_self_test(stdout);
    } else {
        return -1;
    }
    return failed || fflush(stdout);
}

int main(int argc, char **argv)
{
    uint64_t bytes = 1000000, seed = 1;
    const char *roots = NULL;
#ifdef SIGPIPE
    signal(SIGPIPE, SIG_IGN);           // a closed pipe shows as a failed write
#endif
    const int status = argc == 2 ? run_alone(argv[1]) : -1;
    if (status >= 0) {
        return status;
    }
    for (int i = 1; i < argc; i += 2) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        const int b = !strcmp(option, "--bytes"), s = !strcmp(option, "--seed");
        if (!b && !s && strcmp(option, "--roots")) {
            fprintf(stderr, "language: unknown option '%s': expected --bytes N, --seed N or "
                    "--roots FILE, or one of --entropy, --test, --help alone\n", option);
            return 2;
        }
        if (!value) {
            fprintf(stderr, "language: %s: expected a value after it\n", option);
            return 2;
        }
        if ((b && !read_number(option, value, 1, 1000000000000000, &bytes)) ||
            (s && !read_number(option, value, 0, UINT64_MAX, &seed))) {
            return 2;
        }
        roots = b || s ? roots : value;
    }
    return write_text(bytes, seed, roots);
}
#endif
