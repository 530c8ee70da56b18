// progress.c: the line that shows how far a run is. Read progress.h first.
#define _POSIX_C_SOURCE 200809L
#include "support/progress.h"

#include <stdarg.h>

void progress_begin(Progress *p, int64_t step) {
    p->last = p->marks[0].time = p->marks[1].time = now();
    p->marks[0].step = p->marks[1].step = step;
}

bool progress_due(const Progress *p, double on_terminal, double elsewhere) {
    return now() - p->last >= (p->terminal ? on_terminal : elsewhere);
}

void progress_line(Progress *p, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (p->terminal) fputc('\r', stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    // What an earlier, longer line has left is erased.
    fputs(p->terminal ? "\033[K" : "\n", stderr);
    fflush(stderr);
    p->open = p->terminal;
    p->last = now();
}

void progress_end(Progress *p) {
    if (p->open) fputc('\n', stderr);
    p->open = false;
}

double progress_left(Progress *p, int64_t step, int64_t steps) {
    double t = now();
    if (t - p->marks[1].time > 15) {
        p->marks[0] = p->marks[1];
        p->marks[1].time = t;
        p->marks[1].step = step;
    }
    double done = (double)(step - p->marks[0].step), seconds = t - p->marks[0].time;
    return (double)(steps - step) * seconds / (done > 0 ? done : 1);
}

const char *duration(double seconds, char *buffer, size_t size) {
    int64_t s = (int64_t)seconds;
    if (s < 3600)
        snprintf(buffer, size, "%lldm%02llds", (long long)s / 60, (long long)s % 60);
    else if (s < 86400)
        snprintf(buffer, size, "%lldh%02lldm", (long long)s / 3600, (long long)s % 3600 / 60);
    else
        snprintf(buffer, size, "%lldd%02lldh", (long long)s / 86400, (long long)s % 86400 / 3600);
    return buffer;
}
