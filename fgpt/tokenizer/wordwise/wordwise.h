/* Word-by-word encoder for SentencePiece models; word_cache.c describes the method. */
#ifndef FGPT_WORDWISE_H
#define FGPT_WORDWISE_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

/* ---- vocabulary ---- */

/* Double-array trie (Aoe 1989): the child of state s by byte c is cell next[s] + c if that cell's parent is s.
   State 0 is the root; an unused cell has parent -1. */
typedef struct {
    uint32_t next;
    int32_t parent;
} Cell;

typedef struct {
    Cell *cells;
    int32_t *ids;  /* id of the piece that ends in this state; -1: none */
    uint32_t size; /* number of cells; the last 256 are unused, so next[s] + c is always in range */
} Trie;

/* Which neighboring characters can occur inside a piece; every other pair is a word boundary. */
typedef struct {
    uint8_t *byte_pairs;       /* [65536], index second << 8 | first: INSIDE, BOUNDARY or LOOK_UP (boundaries.c) */
    uint64_t *inside_pairs;    /* hash set of character pairs, not both ASCII, that occur inside a piece */
    uint32_t inside_pairs_mask; /* number of slots - 1 */
} Boundaries;

/* Buffers for segmenting one word. */
typedef struct {
    float *best, *second;
    uint32_t *from, *ids;
    int32_t *states, *joined;
    uint64_t *heap;
    size_t capacity; /* longest word that fits, in bytes */
} Scratch;

enum { UNIGRAM = 0, BPE = 1 };

typedef struct {
    int kind;
    Trie trie;
    const float *scores;      /* score of each id */
    const uint32_t *ranks;    /* BPE: merge priority of each id, the largest first */
    float unknown_score;      /* Unigram: score of a character that is no piece */
    const uint32_t *byte_ids; /* [256] ids of the byte pieces, which replace an unknown character */
    Scratch scratch;
} Model;

/* The ids of one word, for a given sum of scores in front of the word. */
typedef struct {
    uint32_t *ids;
    size_t count;
    float sum;        /* Unigram: sum of scores at the end of the word */
    float margin;     /* Unigram: smallest gap between the best and the second-best path on the way */
    float lowest_sum; /* Unigram: lowest sum on the way, relative to the start of the word */
} Segmentation;

int trie_build(Trie *trie, const uint8_t *text, const int64_t *ends, const int32_t *ids, int64_t count);
int boundaries_build(Boundaries *boundaries, const uint8_t *text, const int64_t *ends, int64_t count);
int is_boundary(const Boundaries *boundaries, const uint8_t *at);
uint32_t find_word_starts(const Boundaries *boundaries, const uint8_t *text, uint32_t bytes, uint32_t *starts);
void unigram_segment(Model *model, const uint8_t *word, size_t bytes, float sum, Segmentation *result);
void bpe_segment(Model *model, const uint8_t *word, size_t bytes, Segmentation *result);

/* ---- word cache ---- */

#define SHORT_BYTES 16
#define SHORT_IDS 3
#define SHORT_ENTRIES (1u << 17)
#define LONG_BYTES 64
#define LONG_IDS 12
#define LONG_ENTRIES (1u << 13)
#define BLOCK_BYTES 512u /* text that is split into words at once */

typedef struct {
    uint64_t key[2]; /* the word, zero-padded */
    uint64_t ids;    /* SHORT_IDS ids of ID_BITS bits, the first lowest, padded with zero_score_id */
    float max_sum;   /* valid while |sum of scores in front of the word| < max_sum */
    uint8_t bytes;   /* length of the word; 0: empty entry */
    uint8_t count;   /* number of ids; more than SHORT_IDS: look in the long entries */
} ShortEntry;

typedef struct {
    uint8_t key[LONG_BYTES];
    uint32_t ids[LONG_IDS];
    float max_sum;
    uint8_t bytes, count;
} LongEntry;

typedef struct {
    Model model;
    uint32_t zero_score_id; /* an id that is no piece; its score is 0 */
    Boundaries boundaries;
    ShortEntry *short_entries;
    LongEntry *long_entries;
    uint32_t starts[BLOCK_BYTES + 2]; /* where the words of a block start */
    uint32_t slots[BLOCK_BYTES + 2];  /* their positions in short_entries */
} Encoder;

int scratch_reserve(Scratch *scratch, size_t bytes);
uint32_t *encode_text(Encoder *e, const uint8_t *text, const uint8_t *end, uint32_t *out);

/* ---- helpers ---- */

static inline uint64_t hash_pair(uint64_t a, uint64_t b)
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

/* Byte fallback: write the ids of the bytes of a character that is no piece. */
static inline size_t emit_bytes(const Model *model, const uint8_t *text, size_t bytes, uint32_t *ids)
{
    for (size_t i = 0; i < bytes; i++)
        ids[i] = model->byte_ids[text[i]];
    return bytes;
}

#endif
