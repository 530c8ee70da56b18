// checkpoint.h: models and training states on disk, as safetensors files that PyTorch reads.
//
// A model file holds every tensor of the model's table under its PyTorch name, in PyTorch's layout
// (conv (O,C,K) with the LAST tap the current byte, linear (O,C)), float32, and in __metadata__ all
// that is needed to rebuild the model. A state file holds the same tensors once per role, named
// role/tensor (params/..., m/..., v/..., ema/...), for resuming. A float32 comes back bit for bit.
// The reader trusts nothing: checkpoint.c is the one place where bytes from elsewhere are parsed.
// Read model.h first; test_sample.c is what it must withstand.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include <stdio.h>

#include "model.h"
#include "support/output.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- Writing ------------------------------------------------------------------------------------

// One line of __metadata__. A byte that is not UTF-8 is written as U+FFFD. The keys "format",
// "model", "version", "roles", "checksum" and those of the configuration are the file's own.
typedef struct {
    const char *key, *value;
} Pair;

// A parameter-like array on the host, n_params values in the layout of the model's table.
typedef struct {
    const char *name;  // "" in a model file; "params", "m", "v", "ema" ... (a-z) in a state file
    const real *values;
} Role;

// Writes `path` anew, whole or not at all (see Output). One role named "" makes a model file, roles
// with names make a state file. Of m only the configuration and the table of tensors are read. A
// value that is not finite is refused: what is saved can be loaded.
int checkpoint_save(const char *path, const Model *m, const Role *roles, int n_roles,
                    const Pair *pairs, int n_pairs, Error *e);

// ---- Reading ------------------------------------------------------------------------------------

typedef struct {
    const char *name;  // inside Checkpoint.header
    uint64_t dims[3];
    int ndim;
    uint64_t begin, end;  // bytes of the data section
    bool known;           // the model has such a tensor
} Entry;

enum { MAX_ROLES = 8, MAX_PAIRS = 256 };

// An open file whose header has been found sound and complete. The first three are for the caller.
// It points into itself: pass it on by address, never as a copy.
typedef struct {
    Config config;
    size_t n_params;
    bool is_state;  // has roles; a model file has not

    char *name;  // for messages
    FILE *file;  // or, when parsed from memory:
    const uint8_t *bytes;
    uint64_t size, data;  // of the file; where its data section starts
    char *header;         // its strings unescaped in place: names, keys and values point here
    Entry *entries;       // sorted by name
    size_t n_entries;
    Pair pairs[MAX_PAIRS];
    int n_pairs;
    char role_names[64];
    const char *roles[MAX_ROLES];  // in role_names
    int n_roles;
    Model table;  // its tensors and nothing else: no memory for parameters
} Checkpoint;

// Opens and validates a file before anything large is allocated: the header's grammar, every
// tensor's name, dtype, shape and place, the configuration, the checksum. What it allocates is in
// proportion to the header. On failure the error names the file and the fault, and nothing is open.
int checkpoint_open(Checkpoint *ck, const char *path, Error *e);
// The same from memory, which must stay until checkpoint_close. `name` stands in messages.
int checkpoint_parse(Checkpoint *ck, const char *name, const void *bytes, size_t size, Error *e);
// The metadata under a key, or NULL. Lives until checkpoint_close.
const char *checkpoint_get(const Checkpoint *ck, const char *key);
// Whether a key is the file's own: not one of the pairs that checkpoint_save was given.
bool checkpoint_own_key(const char *key);
bool checkpoint_has_role(const Checkpoint *ck, const char *role);
// 0 if the file's configuration is c, otherwise -1 with every difference.
int checkpoint_match(const Checkpoint *ck, const Config *c, Error *e);
// Reads a role ("" of a model file) into host (n_params values, our layout). -1 if the role is not
// there, on a read error, or on a value that is not finite, with the tensor's name.
int checkpoint_read(const Checkpoint *ck, const char *role, real *host, Error *e);
// Takes a Checkpoint in any state after checkpoint_open, also a zeroed one.
void checkpoint_close(Checkpoint *ck);

// A model file, ready for inference on windows (B,T): checkpoint_open, model_open, parameters. On
// failure nothing is left allocated. A state file is refused with a hint.
int checkpoint_load_model(Model *m, const char *path, const Backend *backend, int B, int T,
                          Error *e);

// Bytes of the UTF-8 character at p, 1 to 4; 0 if there is none (overlong, a surrogate, cut off).
int utf8_length(const uint8_t *p, const uint8_t *end);

#ifdef __cplusplus
}
#endif
#endif
