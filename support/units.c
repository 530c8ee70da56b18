// units.c: the stack of units as text: the one place that parses it, and the one that prints it.
//   stack = item...      item = NAME[:NUMBER...][:ACTIVATION] | [N x] ( stack )
// Every message points at the character. Read model.h first (units_parse says what is allowed).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mixers/list.h"
#include "model.h"

// ---- The tables by name -------------------------------------------------------------------------

#define MIXER_ROW(name) &name##_mixer,
const Mixer *const mixers[] = {MIXERS(MIXER_ROW)};
const int n_mixers = sizeof mixers / sizeof *mixers;

#define ACTIVATION_NAME(name) #name,
const char *const activation_names[] = {ACTIVATIONS(ACTIVATION_NAME) NULL};

Activation activation_of(const char *name) {
    int a = 0;
    while (a < N_ACTIVATIONS && strcmp(name, activation_names[a]) != 0) a++;
    return (Activation)a;
}

// ---- Parsing ------------------------------------------------------------------------------------

enum { MAX_NESTING = 16, WORD = 32 };

typedef struct {
    const char *text, *p;  // p: what comes next
    int channels, window;
    Activation activation;
    Unit *units;
    int n;
    Error *e;
} Parser;

// Says what is wrong at `at`, and shows where: the text from there on.
static int wrong(const Parser *s, const char *at, const char *what) {
    return fail(s->e, "units: %.200s at character %d, '%.20s'", what, (int)(at - s->text) + 1,
                *at ? at : "the end");
}

static void skip_spaces(Parser *s) {
    while (*s->p == ' ' || *s->p == '\t' || *s->p == '\n') s->p++;
}

// Letters and digits from a letter on, at most WORD - 1 of them; "" where there is none.
static void word(Parser *s, char to[WORD]) {
    int n = 0;
    while (n < WORD - 1 && ((*s->p >= 'a' && *s->p <= 'z') || (n > 0 && *s->p >= '0' &&
                                                                 *s->p <= '9')))
        to[n++] = *s->p++;
    to[n] = 0;
}

// Digits. -1: a number beyond nine of them, which no bound here allows.
static int number(Parser *s, int *to) {
    const char *start = s->p;
    for (*to = 0; *s->p >= '0' && *s->p <= '9'; s->p++) {
        if (s->p - start == 9) return wrong(s, start, "a number of more than nine digits");
        *to = *to * 10 + (*s->p - '0');
    }
    return 0;
}

static int unknown_mixer(const Parser *s, const char *at) {
    char what[200] = "expected a mixer, one of";
    for (int i = 0; i < n_mixers; i++)
        snprintf(what + strlen(what), sizeof what - strlen(what), "%s %s", i ? "," : "",
                 mixers[i]->name);
    snprintf(what + strlen(what), sizeof what - strlen(what), ", or a group");
    return wrong(s, at, what);
}

static int count_numbers(const Mixer *m) {
    int n = 0;
    while (n < MAX_DECLARED && m->numbers[n].name) n++;
    return n;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Which of the declared numbers text (behind a colon) gives: the next one without a prefix, or the
// one whose prefix stands there. -1: none; then it may be an activation.
static int which_number(const Mixer *m, int next, const char *text) {
    if (is_digit(*text)) return next;
    for (int i = 0; i < MAX_DECLARED && m->numbers[i].name; i++) {
        const char *prefix = m->numbers[i].prefix;
        size_t n = prefix ? strlen(prefix) : 0;
        if (n && strncmp(text, prefix, n) == 0 && is_digit(text[n])) return i;
    }
    return -1;
}

// The numbers behind a mixer's name: those that repeat follow the last declared one.
static int parse_numbers(Parser *s, Unit *u) {
    const Mixer *m = u->mixer;
    const int declared = count_numbers(m), most = m->repeats ? MAX_NUMBERS : declared;
    char what[200];
    int next = 0, given = 0;  // a bit for each declared one
    for (int i = 0; i < declared; i++) u->numbers[i] = m->numbers[i].fallback;
    for (int i; *s->p == ':' && (i = which_number(m, next, s->p + 1)) >= 0;) {
        const char *at = ++s->p;
        const Number *d = &m->numbers[i < declared || declared == 0 ? i : declared - 1];
        if (i == most || (i == next && i < declared && d->prefix && is_digit(*at))) {
            snprintf(what, sizeof what, "%s takes at most %d numbers%s", m->name, i,
                     i == most ? "" : " without a letter");
            return wrong(s, at, what);
        }
        if (i < declared && given >> i & 1) {
            snprintf(what, sizeof what, "%s of %s given twice", d->name, m->name);
            return wrong(s, at, what);
        }
        given |= i < declared ? 1 << i : 0;
        if (!is_digit(*at)) s->p += strlen(d->prefix);
        else next++;
        if (number(s, &u->numbers[i])) return -1;
        if (u->numbers[i] < d->low || u->numbers[i] > d->high) {
            snprintf(what, sizeof what, "%s of %s is %d, expected %d to %d", d->name, m->name,
                     u->numbers[i], d->low, d->high);
            return wrong(s, at, what);
        }
    }
    u->n_numbers = next > declared ? next : declared;
    return 0;
}

// The numbers and the activation behind a mixer's name.
static int parse_arguments(Parser *s, Unit *u) {
    const Mixer *m = u->mixer;
    char what[200], name[WORD];
    if (parse_numbers(s, u)) return -1;
    if (*s->p != ':') return 0;
    const char *at = ++s->p;
    word(s, name);
    if (*name && m->activation) u->activation = activation_of(name);
    if (*name && m->activation && u->activation < N_ACTIVATIONS) return 0;
    snprintf(what, sizeof what, "expected a number");
    for (int i = 0; i < count_numbers(m); i++)
        if (m->numbers[i].prefix)
            snprintf(what + strlen(what), sizeof what - strlen(what), " or %s", m->numbers[i].word);
    if (m->activation)
        snprintf(what + strlen(what), sizeof what - strlen(what), " or an activation:");
    for (int a = 0; m->activation && a < N_ACTIVATIONS; a++)
        snprintf(what + strlen(what), sizeof what - strlen(what), " %s", activation_names[a]);
    return wrong(s, at, what);
}

static int too_deep(const Parser *s, const char *at) {
    char what[96];
    snprintf(what, sizeof what, "a stack too deep: more than %d units", MAX_UNITS);
    return wrong(s, at, what);
}

// An input behind a unit that is none.
static int misplaced(const Parser *s, const Unit *u, const char *at) {
    if (!u->mixer->input || s->n == 0 || s->units[s->n - 1].mixer->input) return 0;
    char what[96];
    snprintf(what, sizeof what, "%s stands before all other units", u->mixer->name);
    return wrong(s, at, what);
}

static int parse_unit(Parser *s) {
    const char *at = s->p;
    char name[WORD], what[200];
    Unit u = {.activation = s->activation, .C = s->channels, .index = s->n};
    word(s, name);
    for (int i = 0; i < n_mixers && !u.mixer; i++)
        if (strcmp(mixers[i]->name, name) == 0) u.mixer = mixers[i];
    if (!u.mixer) return unknown_mixer(s, at);
    if (parse_arguments(s, &u)) return -1;
    if (*s->p && !strchr(" \t\n)", *s->p)) return wrong(s, s->p, "expected a space");
    if (u.mixer->fit && u.mixer->fit(&u, s->window, what)) return wrong(s, at, what);
    size_t width = u.mixer->width ? u.mixer->width(&u) : 0;
    if (width > MAX_CHANNELS) {
        snprintf(what, sizeof what, "%s is %zu channels wide with --channels %d, at most %d",
                 u.mixer->name, width, s->channels, MAX_CHANNELS);
        return wrong(s, at, what);
    }
    if (s->n == MAX_UNITS) return too_deep(s, at);
    if (misplaced(s, &u, at)) return -1;
    s->units[s->n++] = u;
    return 0;
}

// Items up to the end or, inside a group, to its ')'.
static int parse_stack(Parser *s, int nesting) {
    for (skip_spaces(s); *s->p && *s->p != ')'; skip_spaces(s)) {
        const char *at = s->p;
        int times = 1;
        bool counted = *s->p >= '0' && *s->p <= '9';
        if (counted && number(s, &times)) return -1;
        if (counted) skip_spaces(s);
        if (counted && (*s->p != 'x' || times == 0))
            return wrong(s, at, times ? "expected x and a group after the number"
                                      : "a group repeated no times");
        if (counted) s->p++, skip_spaces(s);
        if (*s->p != '(') {
            if (counted) return wrong(s, s->p, "expected '('");
            if (parse_unit(s)) return -1;
            continue;
        }
        if (nesting == MAX_NESTING) return wrong(s, s->p, "groups nested more than 16 deep");
        const char *open = s->p++;
        int first = s->n;
        if (parse_stack(s, nesting + 1)) return -1;
        if (*s->p != ')') return wrong(s, open, "a group without its ')'");
        s->p++;
        int count = s->n - first;
        if ((int64_t)first + (int64_t)count * times > MAX_UNITS) return too_deep(s, at);
        for (; times > 1; times--)
            for (int i = 0; i < count; i++) {
                if (misplaced(s, &s->units[first + i], at)) return -1;
                s->units[s->n] = s->units[first + i];
                s->units[s->n].index = s->n;
                s->n++;
            }
    }
    return 0;
}

int units_parse(const char *text, int channels, Activation activation, int window, Unit *units,
                Error *e) {
    Parser s = {.text = text, .p = text, .channels = channels, .window = window ? window : 512,
                .activation = activation, .units = units, .e = e};
    if (parse_stack(&s, 0)) return -1;
    if (*s.p) return wrong(&s, s.p, "a ')' too many");
    if (s.n == 0) return fail(e, "units: no unit, expected one like %s", "conv:2:1");
    return s.n;
}

// ---- Printing -----------------------------------------------------------------------------------

const char *unit_text(const Unit *u, Activation usual, char *buffer, size_t size) {
    snprintf(buffer, size, "%s", u->mixer->name);
    for (int i = 0; i < u->n_numbers; i++) {
        size_t used = strlen(buffer);
        const char *prefix = i < MAX_DECLARED ? u->mixer->numbers[i].prefix : NULL;
        snprintf(buffer + used, size - used, ":%s%d", prefix ? prefix : "", u->numbers[i]);
    }
    size_t used = strlen(buffer);
    if (u->mixer->activation && u->activation != usual)
        snprintf(buffer + used, size - used, ":%s", activation_names[u->activation]);
    return buffer;
}

bool unit_same(const Unit *a, const Unit *b) {
    return a->mixer == b->mixer && a->n_numbers == b->n_numbers && a->C == b->C &&
           memcmp(a->numbers, b->numbers, (size_t)a->n_numbers * sizeof *a->numbers) == 0 &&
           (!a->mixer->activation || a->activation == b->activation);
}

// The receptive field, and whether a unit depends on the place in the text.
static int64_t look_at_units(const Config *c, bool *absolute) {
    Unit *units = calloc(MAX_UNITS, sizeof *units);
    Error e;
    int n = units ? units_parse(c->units, c->channels, c->activation, c->window, units, &e) : 0;
    int64_t sum = 1;
    *absolute = false;
    for (int u = 0; u < n; u++) {
        int64_t reach = units[u].mixer->reach(&units[u]);
        if (!units[u].mixer->bytes) sum += reach;
        else if (sum < 1 + reach) sum = 1 + reach;
        *absolute = *absolute || units[u].mixer->absolute;
    }
    free(units);
    return sum;
}

int64_t config_receptive_field(const Config *c) {
    bool absolute;
    return look_at_units(c, &absolute);
}

bool config_absolute(const Config *c) {
    bool absolute;
    look_at_units(c, &absolute);
    return absolute;
}
