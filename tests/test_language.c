// test_language.c: is the built-in corpus what data/language.c says, and its entropy a floor?
//
// Holds the ideal coder: it knows the grammar and the lexicon, reads nothing but the text, and must
// come out at the computed entropy. To see both, this file includes the source itself.
//   ./test_language
#include "data/language.c"

#include "support/output.h"
#include "tests/test.h"

// ---- The ideal coder ----------------------------------------------------------------------------

// Finds the arc and the form that spell text[0..n) in state s. Returns the length of the spelling,
// which is more than n where the text stops within it; 0 if nothing fits.
static size_t match(enum state s, const unsigned char *text, size_t n, const Arc **arc,
                    const Form **form) {
    int at_word = s != START && text[0] == ' ';  // where a word's first letter is
    for (const Arc *a = GRAMMAR[s]; a < GRAMMAR[s] + ARCS && a->weight; a++)
        for (int i = first_form[a->category]; i < first_form[a->category + 1]; i++) {
            const Form *f = &forms[i];
            char spelling[SPELLING_MAX];
            if (s != START && n > 1 && text[at_word] != (unsigned char)f->text[0])
                continue;  // only saves time
            size_t length = (size_t)spell(s, f, spelling);
            if (memcmp(text, spelling, length < n ? length : n) != 0) continue;
            if (is_word(f) && length < n && text[length] >= 'a' && text[length] <= 'z')
                continue;  // the beginning of a longer word
            *arc = a;
            *form = f;
            return length;
        }
    return 0;
}

typedef struct {  // sums over the complete sentences of a text
    double count, bits, bytes, bits_bits, bits_bytes, bytes_bytes;
} Tally;

// Parses text, which must start where a sentence starts and may stop anywhere, and sums up its
// sentences under the generator's own probabilities. Returns whether the language can go on as the
// text does.
static bool parse(const unsigned char *text, size_t n, Tally *t) {
    enum state s = START;
    Sentence current = {0, 0};
    *t = (Tally){0};
    for (size_t at = 0, length; at < n; at += length) {
        const Arc *a;
        const Form *f;
        length = match(s, text + at, n - at, &a, &f);
        if (length == 0) return false;
        if (length > n - at) return true;  // cut off within a word
        current.bits += log2(ARC_ONE / (double)a->weight) + log2(FORM_ONE / (double)f->weight);
        current.bytes += (double)length;
        s = (enum state)a->next;
        if (s != START) continue;
        t->count += 1;
        t->bits += current.bits;
        t->bytes += current.bytes;
        t->bits_bits += current.bits * current.bits;
        t->bits_bytes += current.bits * current.bytes;
        t->bytes_bytes += current.bytes * current.bytes;
        current = (Sentence){0, 0};
    }
    return true;
}

// ---- The tables ---------------------------------------------------------------------------------

// One derivation per text: words are told apart by their letters (small ones, so that a capital can
// be undone) and end where the letters end; no mark begins another, or with a blank; no state has
// two arcs alike.
static void test_unambiguous(void) {
    const int count = first_form[CATEGORIES];
    int alike = 0, odd = 0, twice = 0;
    for (int i = 0; i < count; i++) {
        const char *text = forms[i].text;
        odd += is_word(&forms[i]) && strspn(text, "abcdefghijklmnopqrstuvwxyz") != strlen(text);
        odd += text[0] == ' ';
        for (int j = 0; j < count; j++) {
            size_t shorter = strlen(text) + (size_t)is_word(&forms[i]);
            alike += i != j && strncmp(text, forms[j].text, shorter) == 0;
        }
    }
    for (int s = 0; s < STATES; s++)
        for (int a = 0; a < ARCS; a++)
            for (int b = 0; b < a && GRAMMAR[s][a].weight; b++)
                twice += GRAMMAR[s][a].category == GRAMMAR[s][b].category;
    check(count > 0 && alike == 0 && odd == 0, "all %d surface forms differ, by letters alone",
          count);
    check(twice == 0, "the next word determines the arc in every state");
}

// A draw could run off a table that does not sum to one.
static void test_sums(void) {
    int bad_states = 0, bad_categories = 0;
    for (int s = 0; s < STATES; s++) {
        int sum = 0;
        for (int a = 0; a < ARCS; a++) sum += GRAMMAR[s][a].weight;
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
    check(bad_states == 0, "the chances of the arcs sum to one in every state");
    check(bad_categories == 0, "the chances of the words sum to one in every category");
    if (bad_states || bad_categories) need(false, "sums of one: no text can be drawn");
}

// ---- The text -----------------------------------------------------------------------------------

static void test_seeds(unsigned char *text, size_t n) {
    const size_t half = n / 2;
    unsigned char *other = text + half;
    language_write(text, half, 1);
    check(checksum_add(CHECKSUM_START, text, half) == 0x74f7e44aa7d0b961,
          "seed 1 gives the bytes it gave where this was written");
    language_write(other, half, 1);
    check(memcmp(text, other, half) == 0, "the same seed gives the same bytes");
    language_write(other, half / 3, 1);
    check(memcmp(text, other, half / 3) == 0, "a shorter text begins the longer one");
    Writer w = {.seed = 1};
    for (size_t at = 0; at < half; at += 999)
        write_on(&w, other + at, half - at < 999 ? half - at : 999);
    check(memcmp(text, other, half) == 0, "written in pieces it is the same");
    language_write(other, half, 2);
    check(memcmp(text, other, 200) != 0, "another seed gives other bytes");
    language_write(other, half, 1 + ((uint64_t)1 << 32));
    check(memcmp(text, other, 200) != 0, "the upper half of the seed counts");
}

// Is the mean bits per byte of the sample compatible with the floor h? The residuals
// bits_i - h * bytes_i of the sentences are independent, and of mean zero if h is the floor; so
// their sum stays within 4 standard deviations but for one sample in 16000. The deviation is taken
// from the sample's own spread.
static bool compatible(const Tally *t, double h) {
    double squares = t->bits_bits - 2 * h * t->bits_bytes + h * h * t->bytes_bytes;
    return t->count > 1000 && fabs(t->bits - h * t->bytes) <= 4 * sqrt(squares);
}

static void test_floor(unsigned char *text, size_t n) {
    const double h = language_entropy(), bytes_expected = expectation().bytes;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        Tally t;
        language_write(text, n, seed);
        bool parsed = parse(text, n, &t);
        double spread = sqrt(t.bytes_bytes - t.bytes * t.bytes / t.count);
        check(parsed && compatible(&t, h),
              "seed %d, %.0f sentences: ideal coder %.6f, floor %.6f bits/byte", (int)seed, t.count,
              t.bits / t.bytes, h);
        check(parsed && !compatible(&t, h * 1.01) && !compatible(&t, h * 0.99),
              "    a floor 1 %% higher or lower would have been noticed");
        check(fabs(t.bytes - t.count * bytes_expected) <= 4 * spread,
              "    a sentence has %.3f bytes, expected %.3f", t.bytes / t.count, bytes_expected);
    }
}

static bool is_language(const char *text) {
    Tally t;
    return parse((const unsigned char *)text, strlen(text), &t) && t.count > 0;
}

static void test_refusals(void) {
    static const char *const pairs[][2] = {  // of the language, and just not
        {"The brosk slints. ", "The brosk slint. "}, {"They slint. ", "They slints. "},
        {"These brosks of the plark gorm.\n", "These brosks of the plark gorms.\n"},
        {"An undrusk brosk gorms! ", "An drusk brosk gorms! "},
        {"Can she gorm? ", "Can she gorm. "}, {"She gormed us. ", "she gormed us. "},
        {"We outslint. ", "We overslint. "}, {"Druskly, we gorm. ", "Druskly we gorm. "},
    };
    enum { N = 2000 };
    unsigned char text[N];
    Tally t;
    bool ok = true;
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        ok = ok && is_language(pairs[i][0]) && !is_language(pairs[i][1]);
    check(ok, "the coder takes what the grammar makes and refuses what it nearly makes");
    language_write(text, N, 6);
    ok = true;
    for (int i = 0; i < N; i++) {
        unsigned char kept = text[i];
        text[i] = '#';
        ok = ok && !parse(text, N, &t);
        text[i] = kept;
    }
    check(ok, "one foreign byte, wherever it is, is refused");
    ok = parse(text, 0, &t) && t.count == 0;
    for (size_t n = 500; n <= N; n++) ok = ok && parse(text, n, &t) && t.count > 0;
    check(ok, "a text may stop at any byte, and an empty one has no sentence");
}

// The states in which the language may be after a token, if it was in one of the given states (bits
// of a set) before. A capital shows that the token opened a sentence.
static uint32_t follow(uint32_t states, int category, bool capital) {
    uint32_t next = 0;
    for (int s = 0; s < STATES; s++)
        for (int a = 0; a < ARCS && (states >> s & 1) && (s == START) == capital; a++)
            if (GRAMMAR[s][a].weight && GRAMMAR[s][a].category == category)
                next |= (uint32_t)1 << GRAMMAR[s][a].next;
    return next;
}

// A model that sees 43 bytes can come near the floor only if these tell it the state. So for every
// token we forget all but the 43 bytes before its last one, allow every state where they begin, and
// let the whole tokens among them rule states out.
static void test_reach(unsigned char *text, size_t n) {
    enum { SEES = 43, KEPT = 64 };  // 43 bytes never hold 64 tokens
    struct {
        size_t start;
        int category;
        bool capital;
    } past[KEPT] = {{0, THE, false}};
    size_t tokens = 0, known = 0, length = 0;
    enum state s = START;
    language_write(text, n, 7);
    for (size_t at = 0; at < n; at += length, tokens++) {
        const Arc *a;
        const Form *f;
        length = match(s, text + at, n - at, &a, &f);
        if (length == 0 || length > n - at) break;
        uint32_t states = ((uint32_t)1 << STATES) - 1;
        for (size_t j = tokens < KEPT ? 0 : tokens - KEPT; j < tokens; j++)
            if (past[j % KEPT].start + SEES >= at + length - 1)
                states = follow(states, past[j % KEPT].category, past[j % KEPT].capital);
        known += states == (uint32_t)1 << s;
        past[tokens % KEPT].start = at;
        past[tokens % KEPT].category = a->category;
        past[tokens % KEPT].capital = s == START;
        s = (enum state)a->next;
    }
    check(tokens > n / 20 && (double)known >= 0.99 * (double)tokens,
          "the last %d bytes tell the state for %.2f %% of the tokens", SEES,
          100.0 * (double)known / (double)tokens);
}

int main(void) {
    const size_t n = 2000000;
    unsigned char *text = malloc(n);
    need(text != NULL, "out of memory");
    build_lexicon();
    test_unambiguous();
    test_sums();
    test_seeds(text, n);
    test_floor(text, n);
    test_refusals();
    test_reach(text, 500000);
    free(text);
    return finish();
}
