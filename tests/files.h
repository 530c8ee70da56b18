// files.h: what the tests of files share: a folder that goes away, files, models in them.
#ifndef FILES_H
#define FILES_H

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/checkpoint.h"
#include "tests/test.h"

static const Backend *const cpu = &cpu_backend;
static char folder[256] = "/tmp/test_files.XXXXXX";

// The name lasts for a few calls.
static inline const char *in_folder(const char *name) {
    static char paths[8][400];
    static int turn;
    turn = (turn + 1) % 8;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

static inline uint8_t *read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    *n = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    uint8_t *bytes = malloc(*n + 1);
    need(bytes != NULL && fread(bytes, 1, *n, f) == *n, "cannot read back a file");
    bytes[*n] = 0;
    fclose(f);
    return bytes;
}

static inline void write_bytes(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    need(f != NULL && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, "cannot write a file");
}

static inline void open_filled(Model *m, const Config *c, uint64_t seed) {
    open_or_die(m, cpu, c, 1, 1, NULL);
    fill_params(m, seed);
}

static inline void save_or_die(const char *path, const Model *m) {
    const Role role = {"", m->params};
    const Pair pairs[] = {{"text", "a \"quoted\" \\ one,\nwith \xC3\xA9 and \xFF"}};
    Error e;
    if (checkpoint_save(path, m, &role, 1, pairs, 1, &e)) need(false, e.text);
}

// How many names in the folder begin so.
static inline int entries(const char *start) {
    DIR *d = opendir(folder);
    int n = 0;
    need(d != NULL, "the temporary folder");
    for (struct dirent *entry; (entry = readdir(d));)
        n += strncmp(entry->d_name, start, strlen(start)) == 0;
    closedir(d);
    return n;
}

static inline void make_folder(void) { need(mkdtemp(folder) != NULL, "a temporary folder"); }

static inline int remove_folder_and_finish(void) {
    char command[400];
    snprintf(command, sizeof command, "rm -r %s", folder);
    if (system(command)) printf("     %s is left behind\n", folder);
    return finish();
}

#endif
