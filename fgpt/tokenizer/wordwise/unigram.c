/* Unigram: the best path by Viterbi, as `EncodeOptimized` of sentencepiece 0.2.3 finds it.

   That adds up float32 from the beginning of the text, brings the sums back to 0 below -100000, and
   of two equal ways keeps the one that it met first. So does this, from a word's beginning. */
#include <math.h>
#include <string.h>

#include "words.h"

static const float RESET = 100000.0f;

/* fminf is a call where the compiler minds NaN. */
static inline float least(float a, float b)
{
    return a < b ? a : b;
}

typedef struct {
    Scratch *s;
    size_t frontier; /* the furthest position that has a way */
} Lattice;

#define NOWHERE UINT32_MAX /* a position without a way: best is -infinity */

static inline void offer(Lattice *lattice, size_t from, size_t to, float sum, uint32_t id)
{
    Scratch *s = lattice->s;
    if (to > lattice->frontier)
        lattice->frontier = to;
    if (s->from[to] == NOWHERE || sum > s->best[to]) {
        s->second[to] = s->best[to];
        s->best[to] = sum;
        s->from[to] = (uint32_t)from;
        s->ids[to] = id;
    } else if (sum > s->second[to]) {
        s->second[to] = sum;
    }
}

static void reset(Lattice *lattice, size_t at)
{
    float offset = lattice->s->best[at];
    for (size_t i = at; i <= lattice->frontier; i++)
        lattice->s->best[i] -= offset;
    lattice->s->best[at] = 0;
}

/* All ways forward from one position; whether its character is a piece. */
static int extend(const Model *model, Lattice *lattice, const uint8_t *word, size_t at, size_t bytes,
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
            offer(lattice, at, end, model->scores[id] + sum, (uint32_t)id);
            is_piece |= end - at == character;
        }
    }
    return is_piece;
}

#define UNKNOWN UINT32_MAX

/* Read the best path backwards into cut->ids, from the end of its `bytes` places. */
static void read_back(const Model *model, const Scratch *s, const uint8_t *word, size_t bytes, Cut *cut)
{
    uint32_t *end = cut->ids + bytes, *at = end;
    float margin = INFINITY;
    for (size_t to = bytes; to; to = s->from[to]) {
        margin = least(margin, s->best[to] - s->second[to]);
        size_t from = s->from[to];
        if (s->ids[to] == UNKNOWN) {
            at -= to - from;
            put_bytes(model, word + from, to - from, at);
        } else {
            *--at = s->ids[to];
        }
    }
    cut->margin = margin;
    cut->count = (size_t)(end - at);
    for (size_t i = 0; i < cut->count; i++)
        cut->ids[i] = at[i];
}

/* `cut->ids` has room for `bytes`; scratch fits the word. */
void unigram_cut(Model *model, const uint8_t *word, size_t bytes, float sum, Cut *cut)
{
    Lattice lattice = {&model->scratch, 0};
    float *best = model->scratch.best, lowest = 0;
    for (size_t i = 0; i <= bytes; i++)
        best[i] = model->scratch.second[i] = -INFINITY;
    memset(model->scratch.from, 0xFF, (bytes + 1) * sizeof *model->scratch.from); /* NOWHERE */
    best[0] = sum;
    for (size_t at = 0; at < bytes;) {
        if (best[at] < -RESET || best[at] > RESET) {
            reset(&lattice, at);
            lowest = -INFINITY; /* not a word to remember */
        }
        lowest = least(lowest, best[at] - sum);
        size_t character = char_bytes(word[at]);
        if (character > bytes - at)
            character = bytes - at;
        if (!extend(model, &lattice, word, at, bytes, character))
            offer(&lattice, at, at + character, model->unknown_score + best[at], UNKNOWN);
        at += character;
    }
    cut->sum = best[bytes];
    cut->lowest = least(lowest, best[bytes] - sum);
    read_back(model, &model->scratch, word, bytes, cut);
}
