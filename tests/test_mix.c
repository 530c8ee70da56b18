// test_mix.c: predictors. Their 256 probabilities add up to 1 exactly and are those that a byte is
// coded with; nothing is known before it was told; what is told is learnt; and the arithmetic that
// archives rest on is as exact as libm's. (Compiled with -DPORTABLE, as ./sample is.)
//   ./test_mix
#define _POSIX_C_SOURCE 200809L
#include "support/predictor.h"
#include "support/portable.h"
#include "support/range_coder.h"
#undef exp
#undef tanh
#undef sin
#undef cos
#undef tanhf
#include "tests/files.h"

enum { TEXT = 3000 };

static const Config config = {.channels = 24, .latent = 24, .activation = ACT_gelu, .tie = true,
                              .units = "conv:2:3 attn:2:20:kv1:r6 mlp:2:lrelu2 block:3:1:2",
                              .softcap = 9};
static real *params;

static void open_predictor(Predictor *p, Stream *s, int kind, bool network) {
    Error e;
    if (network && stream_open(s, &config, params, 1, &e)) need(false, e.text);
    if (predictor_open(p, (MixKind)kind, network ? s : NULL, &e)) need(false, e.text);
}

static void close_predictor(Predictor *p, Stream *s, bool network) {
    predictor_free(p);
    if (network) stream_free(s);
}

// Words in an order that is random, and with `noise` bytes that are.
static void make_text(uint8_t *text, size_t n, bool noise) {
    static const char *const words[] = {"the ", "cat ", "sat ", "on ", "Mat's ", "mat.\n",
                                        "\xC3\xA9t\xC3\xA9 "};
    for (size_t i = 0, k = 0; i < n; k++) {
        uint32_t r = philox(noise ? 31 : 30, (uint32_t)k, 0, 0, RNG_TEST).v[0];
        const char *word = words[r % 7];
        if (noise) text[i++] = (uint8_t)r;
        else while (*word && i < n) text[i++] = (uint8_t)*word++;
    }
}

static void test_bytes(int kind, bool network, const uint8_t *text, const char *what) {
    Predictor asked, plain;
    Stream s[2];
    uint32_t freq[V];
    int sums = 0, zeros = 0, changed = 0;
    open_predictor(&asked, &s[0], kind, network);
    open_predictor(&plain, &s[1], kind, network);
    for (int i = 0; i < TEXT; i++) {
        uint64_t sum = 0;
        bool ask = i < 40 || i % 10 == 0;
        if (ask) predictor_bytes(&asked, freq);
        for (int v = 0; v < V && ask; v++) sum += freq[v], zeros += freq[v] == 0;
        sums += ask && sum != ONE_BYTE;
        for (int k = 7; k >= 0; k--) {
            changed += predictor_bit(&asked) != predictor_bit(&plain);
            predictor_tell(&plain, text[i] >> k & 1);
            if (k > 0) predictor_tell(&asked, text[i] >> k & 1);
        }
        predictor_tell(&asked, text[i] & 1);
    }
    check(sums == 0 && zeros == 0, "256 probabilities add up to 2^30 exactly, none 0: %s", what);
    check(changed == 0, "to ask for them changes nothing: %s", what);
    close_predictor(&asked, &s[0], network);
    close_predictor(&plain, &s[1], network);
}

// The bits' price is the byte's; with the context mixer nearly, which learns between them.
static void test_price(int kind, bool network, const uint8_t *text, const char *what) {
    Predictor p;
    Stream s;
    uint32_t freq[V];
    double worst = 0, sums[2] = {0};
    open_predictor(&p, &s, kind, network);
    for (int i = 0; i < TEXT; i++) {
        predictor_bytes(&p, freq);
        double byte = -log((double)freq[text[i]] / ONE_BYTE), bits = predictor_cost(&p, text[i]);
        double error = fabs(byte - bits) / (1 + bits);
        if (bits < 9 && !(error <= worst)) worst = error;
        sums[0] += byte, sums[1] += bits;
    }
    if (kind == MIX_CM) worst = fabs(sums[0] / sums[1] - 1);
    check_error(worst, kind == MIX_CM ? 0.03 : 1e-5, "a byte costs what its bits cost: %s", what);
    close_predictor(&p, &s, network);
}

// Bit probabilities of a whole text.
static void record(int kind, bool network, const uint8_t *text, uint16_t *p) {
    Predictor a;
    Stream s;
    open_predictor(&a, &s, kind, network);
    for (int i = 0; i < TEXT * 8; i++) {
        p[i] = (uint16_t)predictor_bit(&a);
        predictor_tell(&a, text[i / 8] >> (7 - i % 8) & 1);
    }
    close_predictor(&a, &s, network);
}

static void test_causal(int kind, bool network, uint8_t *text, const char *what) {
    static uint16_t before[TEXT * 8], after[TEXT * 8];
    int early = 0, late = 0;
    record(kind, network, text, before);
    for (int k = 0; k < 4; k++) {
        int at = 7 + 701 * k, bit = 1 << (2 * k);  // the first bit that differs is 7 - 2k
        text[at] ^= (uint8_t)bit;
        record(kind, network, text, after);
        text[at] ^= (uint8_t)bit;
        int first = at * 8 + 7 - 2 * k + 1;
        early += memcmp(before, after, (size_t)first * sizeof *before) != 0;
        late += memcmp(before + first, after + first, (TEXT * 8 - (size_t)first) * 2) != 0;
    }
    check(early == 0, "a bit flipped changes no probability up to its own: %s", what);
    check(late == 4, "and some behind it: %s", what);
}

static double cost(int kind, bool network, const uint8_t *prime, const uint8_t *text) {
    Predictor p;
    Stream s;
    double nats = 0;
    open_predictor(&p, &s, kind, network);
    if (prime) predictor_prime(&p, prime, TEXT);
    for (int i = 0; i < TEXT; i++) nats += predictor_cost(&p, text[i]);
    close_predictor(&p, &s, network);
    return nats / TEXT;
}

// A network that is sure of a byte is believed before anything is counted.
static void test_heard(void) {
    Mixture *m = mixture_open(true);
    Tree tree;
    uint32_t freq[V];
    need(m != NULL, "out of memory");
    for (int v = 0; v < V; v++) tree[V + v] = v == 'q' ? 1 << 24 : 1;
    for (int n = V - 1; n > 0; n--) tree[n] = tree[2 * n] + tree[2 * n + 1];
    mixture_begin(m, tree);
    mixture_bytes(m, freq);
    check(freq['q'] > ONE_BYTE / 2, "the mixture hears the network: %.3f",
          (double)freq['q'] / ONE_BYTE);
    free(m);
}

static void test_learning(const uint8_t *words, const uint8_t *noise) {
    for (int kind = 0; kind < 3; kind++) {
        double c = cost(kind, false, NULL, noise);
        check(c > 0.98 * log(256), "what cannot be known is not known: %s, %.3f nats",
              mix_names[kind], c);
    }
    double net = cost(MIX_NONE, true, NULL, words), gram = cost(MIX_NGRAM, true, NULL, words),
           cm = cost(MIX_CM, true, NULL, words), alone = cost(MIX_CM, false, NULL, words);
    check(gram < net - 0.1, "an n-gram helps: %.3f nats for %.3f", gram, net);
    check(cm < 0.75 && alone < 0.75, "words in random order: %.3f, without network %.3f; their "
                                     "entropy is %.3f", cm, alone, log(7) / 5);
    double again = cost(MIX_CM, false, words, words), primed = cost(MIX_CM, true, words, words);
    check(again < 0.06 && primed < 0.05, "primed with the text itself: %.3f, with network %.3f",
          again, primed);
    double known = cost(MIX_NGRAM, false, words, words);
    check(known < cost(MIX_NGRAM, false, NULL, words) - 0.2, "an n-gram is primed, too");
    check(known < 0.65, "and knows six bytes: %.3f", known);
    check(cost(MIX_NONE, true, words, words) == net, "a network alone is not");
    // The network begins after the priming text as it does without one.
    Predictor p;
    Stream s;
    open_predictor(&p, &s, MIX_CM, true);
    predictor_prime(&p, words, TEXT);
    check(s.position == 0 && predictor_network_cost(&p, 'a') == log(256),
          "the network has not read the priming text");
    predictor_free(&p);
    stream_free(&s);
}

// The distribution in whole numbers, and the stream that gives it, of a model with every unit.
static void test_network(void) {
    enum { T = 60 };
    Model m;
    Stream s;
    Error e;
    int ids[T], wrong = 0;
    real *want = new_reals(T * V), logits[V];
    uint32_t freq[V];
    open_or_die(&m, cpu, &config, 1, T, NULL);
    fill_params(&m, 3);
    params = new_reals(m.n_params);
    model_read(&m, params, m.params);
    for (int i = 0; i < T; i++) ids[i] = (int)(philox(6, (uint32_t)i, 0, 0, RNG_TEST).v[0] % V);
    cpu->upload(m.ids, ids, sizeof ids);
    model_forward(&m, NULL);
    cpu->read_acts(want, m.logits, T * V);
    if (stream_open(&s, &config, params, 1, &e)) need(false, e.text);
    double worst = 0;
    for (int i = 0; i < T; i++) {
        stream_push(&s, &ids[i], NULL, logits);
        wrong += !same_bits(logits, want + (size_t)i * V, V);
        double p[V], sum = 0;
        for (int v = 0; v < V; v++) sum += p[v] = exp(9 * tanh((double)logits[v] / 9));
        uint32_t total = frequencies(freq, logits, 9);
        for (int v = 0; v < V; v++) {
            double error = fabs((double)freq[v] / total - p[v] / sum);
            if (!(error <= worst)) worst = error;
        }
    }
    check(wrong == 0, "the portable stream is the portable forward pass, bit for bit");
    check_error(worst, 2e-5, "a network's frequencies are its softmax");
    check(arithmetic_check(&e) == 0, "this build computes as all others do %s", e.text);
    stream_free(&s);
    model_free(&m);
    free(want);
}

static void test_functions(void) {
    double worst[5] = {0};
    for (int i = -2000; i <= 2000; i++) {
        double x = i / 100.0, a = i * 3.141592653589793 / 2000, l = portable_exp(x);
        const double error[5] = {fabs(l / exp(x) - 1),
                                 fabs(portable_log(l) - log(l)) / (1 + fabs(x)),
                                 fabs(portable_tanh(x) - tanh(x)), fabs(portable_sin(a) - sin(a)),
                                 fabs(portable_cos(a) - cos(a))};
        for (int k = 0; k < 5; k++)
            if (!(error[k] <= worst[k])) worst[k] = error[k];
    }
    static const char *const names[] = {"exp", "log", "tanh", "sin", "cos"};
    for (int k = 0; k < 5; k++) check_error(worst[k], 2e-15, "%s without libm", names[k]);
    double tiny = portable_exp(-1e9), none = portable_exp(NAN);
    check(tiny >= 0 && tiny < 1e-300 && none != none,
          "exp of what is far off");
}

static void test_coder(void) {
    enum { BITS = 400000 };
    static uint8_t code[BITS];
    double want = 0;
    int wrong = 0;
    Coder c = encoder(code, sizeof code);
    for (int i = 0; i < BITS; i++) {
        Philox r = philox(8, (uint32_t)i, 0, 0, RNG_TEST);
        int p = 1 + (int)(r.v[0] % 65535), bit = r.v[1] % 65536 < (uint32_t)p;
        want -= log2((bit ? p : 65536 - p) / 65536.0) / 8;
        encode_bit(&c, p, bit);
    }
    encode_end(&c);
    size_t n = (size_t)(c.at - code);
    check_error(fabs((double)n - want) / want, 2e-4, "bits cost what they should, %zu bytes", n);
    c = decoder(code, n);
    for (int i = 0; i < BITS; i++) {
        Philox r = philox(8, (uint32_t)i, 0, 0, RNG_TEST);
        int p = 1 + (int)(r.v[0] % 65535), bit = r.v[1] % 65536 < (uint32_t)p;
        wrong += decode_bit(&c, p) != bit;
    }
    check(wrong == 0 && decode_ended(&c), "and come back");
    c = encoder(code, 3);
    for (int i = 0; i < 100; i++) encode_bit(&c, 32768, i & 1);
    check(c.over, "room that does not suffice is noticed");
}

int main(void) {
    static uint8_t words[TEXT], noise[TEXT];
    make_text(words, TEXT, false);
    make_text(noise, TEXT, true);
    test_functions();
    test_coder();
    test_network();
    for (int kind = 0; kind < 3; kind++)
        for (int network = kind == MIX_NONE; network < 2; network++) {
            char what[40];
            snprintf(what, sizeof what, "%s%s", mix_names[kind], network ? ", network" : "");
            test_bytes(kind, network, words, what);
            test_price(kind, network, words, what);
            test_causal(kind, network, words, what);
        }
    test_heard();
    test_learning(words, noise);
    free(params);
    return finish();
}
