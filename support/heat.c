// heat.c: surprise as colour. Read heat.h first.
#include "support/heat.h"

#include <math.h>
#include <string.h>

#include "support/checkpoint.h"

enum { STEPS = 9 };  // of colour: 0, 1 .. 7 bits per byte, and from 8 on

static int step_of(double bits) { return bits > 8 ? 8 : bits >= 0 ? (int)bits : 0; }

int heat_terminal(char text[HEAT_TEXT], uint8_t byte, uint8_t before, double bits, double saved) {
    static const int colours[STEPS] = {15, 230, 229, 228, 221, 214, 208, 202, 196};
    bool inside = (byte & 0xC0) == 0x80, line = byte == '\n';
    int n = inside ? 0 : snprintf(text, HEAT_TEXT, "\033[%d;38;5;%dm", saved >= 1 ? 4 : 24,
                              colours[step_of(bits)]);
    // 0x80 to 0x9F are controls by themselves, in some terminals, and after 0xC2.
    bool control = byte < 0x80 ? (byte < ' ' && !line) || byte == 127
                               : byte < 0xA0 && (before < 0x80 || before == 0xC2);
    text[n++] = control ? '?' : (char)byte;
    if (line) n += snprintf(text + n, HEAT_TEXT - (size_t)n, "\033[0m");
    return n;
}

// ---- Characters ---------------------------------------------------------------------------------

// The code point of a character of n bytes.
static unsigned code_point(const uint8_t *p, int n) {
    unsigned code = n == 1 ? p[0] : p[0] & (0x7Fu >> n);
    for (int i = 1; i < n; i++) code = code << 6 | (p[i] & 0x3F);
    return code;
}

// Without a shape of its own, or able to move its neighbours: controls, marks of direction, spaces
// of no width, what is no character.
static bool hidden(unsigned c) {
    return c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0xAD || c == 0x61C || c == 0x180E ||
           (c >= 0x200B && c <= 0x200F) || (c >= 0x2028 && c <= 0x202E) ||
           (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF || (c >= 0xFFF9 && c <= 0xFFFB) ||
           (c & 0xFFFE) == 0xFFFE || (c >= 0xFDD0 && c <= 0xFDEF) || (c >> 8) == 0xE00;
}

int put_clean(FILE *f, const char *text) {
    const uint8_t *p = (const uint8_t *)text, *end = p + strlen(text);
    int written = 0;
    for (int n; p < end; p += n ? n : 1) {
        n = utf8_length(p, end);
        bool shown = n && !hidden(code_point(p, n));
        written += (int)fwrite(shown ? (const char *)p : "?", 1, shown ? (size_t)n : 1, f);
    }
    return written;
}

// One character of n bytes, or with n = 0 the byte p[0] that belongs to none. `marked`: as part of
// the text, where what stands for something else is set apart.
static void put_character(FILE *f, const uint8_t *p, int n, bool marked) {
    unsigned c = n ? code_point(p, n) : 0;
    const char *entity = c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;"
                         : c == '"' ? "&quot;" : NULL;
    if (n && !hidden(c)) {
        if (entity)
            fputs(entity, f);
        else
            fwrite(p, 1, (size_t)n, f);
        return;
    }
    if (marked) fputs("<i>", f);
    if (n == 0)
        fprintf(f, "\\x%02X", p[0]);
    else if (c == '\n' || c == '\t')
        fputs(c == '\n' ? "&#8629;" : "&#8677;", f);  // arrows, as on the keys
    else if (c <= 0x7F)
        fprintf(f, "&#%u;", c == 0x7F ? 0x2421 : 0x2400 + c);  // Unicode's pictures of controls
    else
        fprintf(f, "U+%04X", c);
    if (marked) fputs("</i>", f);
    if (marked && (c == '\n' || c == '\t') && n) fputc((int)c, f);
}

static void put_name(FILE *f, const char *name) {
    const uint8_t *p = (const uint8_t *)name, *end = p + strlen(name);
    for (int n; p < end; p += n ? n : 1) put_character(f, p, n = utf8_length(p, end), false);
}

// ---- The page -----------------------------------------------------------------------------------

// All up to the text. Always as long, so that it can be written again when the score is known.
static void put_head(const HeatPage *p, double nats, uint64_t n) {
    FILE *f = p->file;
    double bits = nats / log(2);
    fprintf(f, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>");
    put_name(f, p->name);
    fprintf(f, ": %14.6g bits per byte</title>\n<style>\n"
               ":root { color-scheme: light dark }\n"
               "body { max-width: 60em; margin: 2em auto; padding: 0 1em; font: 16px sans-serif }\n"
               "pre { font: 14px/1.6 monospace; white-space: pre-wrap; overflow-wrap: anywhere }\n"
               "i { font-style: normal; opacity: 0.6 }\n.u { text-decoration: underline }\n", bits);
    // One colour over whatever the background is: dark letters stay dark on it, light ones light.
    for (int i = 1; i < STEPS; i++)
        fprintf(f, ".b%d { background: rgba(255, 60, 0, %.3f) }\n", i, 0.075 * i);
    fprintf(f, "</style>\n</head>\n<body>\n<h1>");
    put_name(f, p->name);
    fprintf(f, "</h1>\n<p>%14.6g nats per byte, %14.6g bits per byte, %20llu bytes</p>\n"
               "<p>bits per byte:", nats, bits, (unsigned long long)n);
    for (int i = 0; i < STEPS; i++)
        fprintf(f, " <span class=\"b%d\">&nbsp;%d%s&nbsp;</span>", i, i, i < 8 ? "" : " or more");
    fprintf(f, "</p>\n<pre>");
}

void heat_page_begin(HeatPage *p, FILE *file, const char *name) {
    *p = (HeatPage){.file = file, .name = name, .step = -1};
    put_head(p, 0, 0);
}

// The first character of those that wait, or the one byte that is none.
static void put_first(HeatPage *p) {
    int n = utf8_length(p->bytes, p->bytes + p->n), used = n ? n : 1;
    double bits = 0, saved = 0;
    for (int i = 0; i < used; i++) bits += p->bits[i] / used, saved += p->saved[i];
    int step = step_of(bits) + (saved >= 1 ? 16 : 0);
    if (step != p->step)
        fprintf(p->file, "%s<span class=\"b%d%s\">", p->step < 0 ? "" : "</span>", step % 16,
                step < 16 ? "" : " u");
    p->step = step;
    put_character(p->file, p->bytes, n, true);
    p->n -= used;
    memmove(p->bytes, p->bytes + used, (size_t)p->n);
    memmove(p->bits, p->bits + used, (size_t)p->n * sizeof *p->bits);
    memmove(p->saved, p->saved + used, (size_t)p->n * sizeof *p->saved);
}

void heat_page_byte(HeatPage *p, uint8_t byte, double bits, double saved) {
    p->bytes[p->n] = byte;
    p->saved[p->n] = saved;
    p->bits[p->n++] = bits;
    if (p->n == 4) put_first(p);
}

int heat_page_end(HeatPage *p, double nats, uint64_t n) {
    while (p->n) put_first(p);
    fprintf(p->file, "%s</pre>\n</body>\n</html>\n", p->step < 0 ? "" : "</span>");
    if (fseek(p->file, 0, SEEK_SET)) return -1;  // not rewind, which forgets errors
    put_head(p, nats, n);
    return 0;
}
