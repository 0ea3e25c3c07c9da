/* Encoding by words, for SentencePiece models: see words.c. */
#ifndef FGPT_WORDS_H
#define FGPT_WORDS_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

enum { UNIGRAM = 0, BPE = 1 };

/* Double array (Aoe 1989): the child of state s by byte c is next[s] + c, if that cell's `parent` is s.
   State 0 is the root; a cell nobody owns has parent -1. */
typedef struct {
    uint32_t next;
    int32_t parent;
} Cell;

typedef struct {
    Cell *cells;
    int32_t *ids; /* id of the piece that ends in a state, -1: none */
    uint32_t size; /* cells; the last 256 are not owned, so that next[s] + c is always inside */
} Trie;

/* Pairs of neighbours that no word is cut between. */
typedef struct {
    uint8_t *pairs;       /* [65536] of bytes, second << 8 | first: NO_CUT, A_CUT, or ASK (cuts.c) */
    uint64_t *inside;     /* a set: pairs of characters, not both ASCII, that a piece has */
    uint32_t inside_mask; /* its places - 1 */
} Cuts;

/* Room to work in, grown to the longest word. */
typedef struct {
    float *best, *second;
    uint32_t *from, *ids;
    int32_t *states, *joined;
    uint64_t *heap;
    size_t room; /* bytes of a word */
} Scratch;

typedef struct {
    int kind;
    Trie trie;
    const float *scores;       /* what each id adds to the sum */
    const uint32_t *ranks;     /* BPE: of each id, the larger is merged first */
    float unknown_score;       /* Unigram: of a character that is no piece */
    const uint32_t *byte_ids;  /* [256] the ids that stand for it */
    Scratch scratch;
} Model;

/* What a word is in ids, when it begins at a sum of scores. */
typedef struct {
    uint32_t *ids;
    size_t count;
    float sum;    /* at its end */
    float margin; /* Unigram: the least by which a choice on the way was made */
    float lowest; /* Unigram: the lowest sum on the way, relative to the beginning */
} Cut;

int trie_build(Trie *trie, const uint8_t *text, const int64_t *ends, const int32_t *ids, int64_t count);
int learn_cuts(Cuts *cuts, const uint8_t *text, const int64_t *ends, int64_t count);
int at_a_cut(const Cuts *cuts, const uint8_t *at);
uint32_t find_words(const Cuts *cuts, const uint8_t *text, uint32_t bytes, uint32_t *starts);
int scratch_fit(Scratch *scratch, size_t bytes);
void scratch_free(Scratch *scratch);
void unigram_cut(Model *model, const uint8_t *word, size_t bytes, float sum, Cut *cut);
void bpe_cut(Model *model, const uint8_t *word, size_t bytes, Cut *cut);

static inline uint64_t mix(uint64_t a, uint64_t b)
{
    __uint128_t product = (__uint128_t)(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD6E8FEB86659FD93u);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline int32_t trie_step(const Trie *trie, int32_t state, uint8_t byte)
{
    uint32_t to = trie->cells[state].next + byte;
    return trie->cells[to].parent == state ? (int32_t)to : -1;
}

static inline size_t char_bytes(uint8_t first)
{
    return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

/* Ids of a character that is no piece: its bytes. */
static inline size_t put_bytes(const Model *model, const uint8_t *text, size_t bytes, uint32_t *ids)
{
    for (size_t i = 0; i < bytes; i++)
        ids[i] = model->byte_ids[text[i]];
    return bytes;
}

#endif
