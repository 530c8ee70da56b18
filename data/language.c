// language.c: writes text in an invented language, and knows its entropy to the last digit.
//
// Words are prefix + root + suffix (un-drusk-ly, out-slint-ed); a grammar of thirty states
// strings them into sentences, and the subject's number decides the verb's ending. All chances are
// whole numbers over a power of two, so the text is the same on every machine. Read GRAMMAR first,
// then expectation(). tests/test_language.c reads the text back, and proves the entropy with it.
//
//   ./data/language --bytes 1000000 --seed 1 > train.txt
#define _POSIX_C_SOURCE 200809L  // options.h
#include "data/language.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "support/arithmetic.h"

// ---- The language: everything the text can say --------------------------------------------------

enum category {
    NOUN_SG, NOUN_PL, VERB_S, VERB_0, VERB_ED, VERB_ING, ADJ, UN_ADJ, ADVERB,
    THE, DET_SG, AN, DET_PL, PRO_SG, PRO_PL, PRO_OBJ, BE_SG, BE_PL, MODAL, OF, PREP, CONJ,
    COMMA, STOP, ASK, CATEGORIES
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

typedef struct {
    enum category category;
    const char *prefix, *roots, *suffix;
    uint32_t weight;
} Recipe;
static const Recipe RECIPES[] = {
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

typedef struct {
    unsigned char weight, category, next;
} Arc;
static const Arc GRAMMAR[STATES][ARCS] = {
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

// ---- The lexicon: every word that can be written, with its chance within its category -----------

enum { FORMS_MAX = 1024, TEXT_MAX = 24, SPELLING_MAX = TEXT_MAX + 1, ZIPF_OFFSET = 8 };

typedef struct {
    char text[TEXT_MAX];
    uint32_t weight;  // chance within the category, in FORM_ONE-ths
} Form;
static Form forms[FORMS_MAX];
static int first_form[CATEGORIES + 1];  // forms of category c: first_form[c] <= i < first_form[c+1]

// The chance of the root of this rank among n, in ROOT_ONE-ths: proportional to 1/(rank + offset),
// rounded down, and rank 0 gets what the rounding left.
static uint32_t zipf(int rank, int n) {
    const uint64_t scale = 1u << 24;
    uint64_t total = 0;
    uint32_t rest = ROOT_ONE;
    for (int i = 0; i < n; i++) total += scale / (uint64_t)(i + ZIPF_OFFSET);
    if (rank > 0) return (uint32_t)(ROOT_ONE * (scale / (uint64_t)(rank + ZIPF_OFFSET)) / total);
    for (int i = 1; i < n; i++) rest -= zipf(i, n);
    return rest;
}

// Appends the forms of one recipe at forms[count]; returns the new count.
static int add_recipe(const Recipe *r, int count) {
    int n = 1;
    for (const char *c = r->roots; *c; c++) n += *c == ' ';
    const char *root = r->roots;
    for (int rank = 0; rank < n; rank++) {
        assert(count < FORMS_MAX);
        Form *f = &forms[count++];
        int length = (int)strcspn(root, " ");
        int written = snprintf(f->text, TEXT_MAX, "%s%.*s%s", r->prefix, length, root, r->suffix);
        assert(written < TEXT_MAX);
        f->weight = r->weight * zipf(rank, n);
        root += length + 1;
    }
    return count;
}

static void build_lexicon(void) {
    if (first_form[CATEGORIES]) return;
    int count = 0;
    for (int c = 0; c < CATEGORIES; c++) {
        first_form[c] = count;
        for (size_t r = 0; r < sizeof RECIPES / sizeof *RECIPES; r++)
            if (RECIPES[r].category == (enum category)c) count = add_recipe(&RECIPES[r], count);
    }
    first_form[CATEGORIES] = count;
}

static bool is_word(const Form *f) { return f->text[0] >= 'a' && f->text[0] <= 'z'; }

// How the form is spelt in this state: a word opens a sentence with a capital, elsewhere a blank
// stands before it; a mark follows directly. Returns the length.
static int spell(enum state s, const Form *f, char spelling[SPELLING_MAX]) {
    int blank = is_word(f) && s != START;
    spelling[0] = ' ';
    strcpy(spelling + blank, f->text);
    if (is_word(f) && s == START) spelling[0] = (char)(spelling[0] - 'a' + 'A');
    return blank + (int)strlen(f->text);
}

// ---- The generator ------------------------------------------------------------------------------

// A text that is being written.
typedef struct {
    uint64_t seed, token;         // token: the number of the next one
    enum state state;
    char spelling[SPELLING_MAX];  // of the token at hand
    int length, used;             // its bytes, and how many of them are already written
} Writer;

// Draws the next token: one number picks the arc, another the word. ARC_ONE and FORM_ONE are powers
// of two, so a draw cut down to that many values favours none of them.
static void next_token(Writer *w) {
    Philox draw = philox(w->seed, (uint32_t)w->token, (uint32_t)(w->token >> 32), 0, 0);
    const Arc *a = GRAMMAR[w->state];
    uint32_t left = draw.v[0] % ARC_ONE;
    for (; left >= a->weight; a++) left -= a->weight;
    const Form *f = &forms[first_form[a->category]];
    left = draw.v[1] % FORM_ONE;
    for (; left >= f->weight; f++) left -= f->weight;
    w->token++;
    w->length = spell(w->state, f, w->spelling);
    w->used = 0;
    w->state = (enum state)a->next;
}

// Writes the next n bytes of the text.
static void write_on(Writer *w, unsigned char *out, size_t n) {
    build_lexicon();
    for (size_t i = 0; i < n; i++) {
        if (w->used == w->length) next_token(w);
        out[i] = (unsigned char)w->spelling[w->used++];
    }
}

void language_write(unsigned char *out, size_t bytes, uint64_t seed) {
    Writer w = {.seed = seed, .state = START};
    write_on(&w, out, bytes);
}

// ---- The floor ----------------------------------------------------------------------------------
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

typedef struct {
    double bits, bytes;
} Sentence;

// E[bits] and E[bytes] of the one token drawn in state s.
static Sentence token_expectation(enum state s) {
    Sentence e = {0, 0};
    char spelling[SPELLING_MAX];
    for (const Arc *a = GRAMMAR[s]; a < GRAMMAR[s] + ARCS && a->weight; a++)
        for (int i = first_form[a->category]; i < first_form[a->category + 1]; i++) {
            double p = (double)a->weight / ARC_ONE * forms[i].weight / FORM_ONE;
            e.bits -= p * log2(p);
            e.bytes += p * spell(s, &forms[i], spelling);
        }
    return e;
}

static Sentence expectation(void) {
    Sentence total = {0, 0}, token[STATES];
    double alive[STATES] = {[START] = 1}, left = 1;
    build_lexicon();
    for (int s = 0; s < STATES; s++) token[s] = token_expectation((enum state)s);
    while (left > 1e-30) {
        double next[STATES] = {0};
        left = 0;
        for (int s = 0; s < STATES; s++) {
            total.bits += alive[s] * token[s].bits;
            total.bytes += alive[s] * token[s].bytes;
            for (int a = 0; a < ARCS; a++)
                next[GRAMMAR[s][a].next] += alive[s] * GRAMMAR[s][a].weight / ARC_ONE;
        }
        next[START] = 0;  // that sentence is over
        for (int s = 0; s < STATES; s++) left += alive[s] = next[s];
    }
    return total;
}

double language_entropy(void) {
    Sentence e = expectation();
    return e.bits / e.bytes;
}

// ---- The program --------------------------------------------------------------------------------

#ifdef LANGUAGE_MAIN
#include "support/options.h"

static int64_t bytes = 1000000;
static uint64_t seed = 1;
static bool entropy;
static Option table[] = {
    INT("bytes", NOT_SAVED, &bytes, 1, 1e15, "N", "length of the text"),
    SEED("seed", NOT_SAVED, &seed, "N", "which text of the language"),
    FLAG("entropy", NOT_SAVED, &entropy, "instead print the language's entropy in bits per byte"),
};

int main(int argc, char **argv) {
    enum { PIECE = 1 << 16 };  // the text may be larger than memory
    static unsigned char piece[PIECE];
    Cli cli = {"language", "usage: ./data/language [options]",
               "Writes text in an invented language to standard output.", table,
               sizeof table / sizeof *table, NULL, 0};
    Error e;
    parse_options(&cli, argc, argv);
    if (cli.n_files) usage_error(&cli, "unexpected '%s'%s", cli.files[0], "");
    Writer w = {.seed = seed, .state = START};
    if (entropy) printf("%.12f\n", language_entropy());
    for (int64_t left = entropy ? 0 : bytes; left > 0 && !ferror(stdout); left -= PIECE) {
        size_t n = left < PIECE ? (size_t)left : PIECE;
        write_on(&w, piece, n);
        fwrite(piece, 1, n, stdout);
    }
    if (fflush(stdout) || ferror(stdout)) {
        fail(&e, "cannot write to standard output: %s", strerror(errno));
        die(&cli, &e);
    }
    return 0;
}
#endif
