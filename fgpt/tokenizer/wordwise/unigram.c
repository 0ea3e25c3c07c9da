/* Unigram: the best path through the lattice of pieces (Viterbi), with the arithmetic of `EncodeOptimized` in
   sentencepiece 0.2.3: float32 sums from the start of the text, reset to 0 outside +-100000, and the first of two
   equal paths wins. This starts at a word with the sum of the text in front of it. */
#include <math.h>
#include <string.h>

#include "wordwise.h"

static const float RESET = 100000.0f;

#define NO_PATH UINT32_MAX /* in `from`: no path ends at this position, its best sum is -infinity */
#define UNKNOWN UINT32_MAX /* in `ids`: a character that is no piece */

/* (fminf would be a function call, because of NaN.) */
static inline float minimum(float a, float b)
{
    return a < b ? a : b;
}

typedef struct {
    Scratch *s;
    size_t frontier; /* the last position that a path reaches */
} Lattice;

/* Add the edge from -> to, whose path has this sum, to the lattice. */
static inline void add_edge(Lattice *lattice, size_t from, size_t to, float sum, uint32_t id)
{
    Scratch *s = lattice->s;
    if (to > lattice->frontier)
        lattice->frontier = to;
    if (s->from[to] == NO_PATH || sum > s->best[to]) {
        s->second[to] = s->best[to];
        s->best[to] = sum;
        s->from[to] = (uint32_t)from;
        s->ids[to] = id;
    } else if (sum > s->second[to]) {
        s->second[to] = sum;
    }
}

/* Subtract the sum at this position from the sums here and at all later positions, as the library does. */
static void reset_sums(Lattice *lattice, size_t at)
{
    float offset = lattice->s->best[at];
    for (size_t i = at; i <= lattice->frontier; i++)
        lattice->s->best[i] -= offset;
    lattice->s->best[at] = 0;
}

/* Add an edge for every piece that starts at this position. Returns whether its character is a piece. */
static int add_pieces(const Model *model, Lattice *lattice, const uint8_t *word, size_t at, size_t bytes,
                      size_t character)
{
    const Trie *trie = &model->trie;
    float sum = lattice->s->best[at];
    int is_piece = 0;
    int32_t state = 0;
    for (size_t end = at; end < bytes;) {
        state = trie_step(trie, state, word[end++]);
        if (state < 0)
            break;
        int32_t id = trie->ids[state];
        if (id >= 0) {
            add_edge(lattice, at, end, model->scores[id] + sum, (uint32_t)id);
            is_piece |= end - at == character;
        }
    }
    return is_piece;
}

/* Follow the best path back from the end of the word. Fills result->ids from the back, then moves them to the
   front. */
static void backtrack(const Model *model, const Scratch *s, const uint8_t *word, size_t bytes, Segmentation *result)
{
    uint32_t *end = result->ids + bytes, *at = end;
    float margin = INFINITY;
    for (size_t to = bytes; to; to = s->from[to]) {
        margin = minimum(margin, s->best[to] - s->second[to]);
        size_t from = s->from[to];
        if (s->ids[to] == UNKNOWN) {
            at -= to - from;
            emit_bytes(model, word + from, to - from, at);
        } else {
            *--at = s->ids[to];
        }
    }
    result->margin = margin;
    result->count = (size_t)(end - at);
    for (size_t i = 0; i < result->count; i++)
        result->ids[i] = at[i];
}

/* Segment a word behind a text of this sum. result->ids has room for `bytes` ids; the scratch fits the word. */
void unigram_segment(Model *model, const uint8_t *word, size_t bytes, float sum, Segmentation *result)
{
    /* 1. an empty lattice: a path reaches position 0 only */
    Lattice lattice = {&model->scratch, 0};
    float *best = model->scratch.best, lowest_sum = 0;
    for (size_t i = 0; i <= bytes; i++)
        best[i] = model->scratch.second[i] = -INFINITY;
    memset(model->scratch.from, 0xFF, (bytes + 1) * sizeof *model->scratch.from); /* NO_PATH */
    best[0] = sum;
    /* 2. forward, character by character: extend the best path to each position by every piece */
    for (size_t at = 0; at < bytes;) {
        if (best[at] < -RESET || best[at] > RESET) {
            reset_sums(&lattice, at);
            lowest_sum = -INFINITY; /* makes max_safe_sum -infinity: the word is never taken from the cache */
        }
        lowest_sum = minimum(lowest_sum, best[at] - sum);
        size_t character = char_bytes(word[at]);
        if (character > bytes - at)
            character = bytes - at;
        if (!add_pieces(model, &lattice, word, at, bytes, character))
            add_edge(&lattice, at, at + character, model->unknown_score + best[at], UNKNOWN);
        at += character;
    }
    /* 3. backward along the best path */
    result->sum = best[bytes];
    result->lowest_sum = minimum(lowest_sum, best[bytes] - sum);
    backtrack(model, &model->scratch, word, bytes, result);
}
