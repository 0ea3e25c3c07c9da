/* Texts -> ids of a SentencePiece model, word by word, each word from memory if it was met before.

   A text is cut wherever no piece of the vocabulary has the two characters beside each other: nothing
   that a model does goes across such a cut. (SentencePiece's trainer keeps letters, digits and signs
   apart, so these words are short and few.) Two tables remember words: 4 MB of short ones, 1 MB of
   longer ones; a new word takes the place of an old one, so memory does not grow.

   Unigram adds up float32 from the beginning of a text, so that rounding decides between nearly equal
   ways. A word is remembered with the sums before which no rounding can (`far`); beyond, it is cut
   anew with the true sum. Sums are above 0, too: behind a word in which they were brought back. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "words.h"

#define SHORT_BYTES 16
#define SHORT_IDS 3
#define SHORT_TABLE (1u << 17)
#define LONG_BYTES 64
#define LONG_IDS 12
#define LONG_TABLE (1u << 13)
#define CHUNK 512u /* bytes that are cut at once */
#define ID_BITS 21
#define ID_MASK ((1u << ID_BITS) - 1)

typedef struct {
    uint64_t key[2];
    uint64_t ids;    /* SHORT_IDS of ID_BITS, the first lowest; the rest are `padding` */
    float far;       /* good while the sum before it is between -far and far */
    uint8_t bytes;   /* 0: empty */
    uint8_t count;   /* more than SHORT_IDS: see the longer words */
} Short;

typedef struct {
    uint8_t key[LONG_BYTES];
    uint32_t ids[LONG_IDS];
    float far;
    uint8_t bytes, count;
} Long;

typedef struct {
    Model model;
    uint32_t padding;     /* an id whose score is 0 */
    Cuts cuts;
    Short *shorts;
    Long *longs;
    uint32_t starts[CHUNK + 2]; /* of the words of a chunk */
    uint32_t places[CHUNK + 2]; /* in the table of short words */
} Words;

/* ---- words ---- */

static int cut(Words *w, const uint8_t *word, size_t bytes, float sum, Cut *found)
{
    if (scratch_fit(&w->model.scratch, bytes))
        return -1;
    if (w->model.kind == UNIGRAM)
        unigram_cut(&w->model, word, bytes, sum, found);
    else
        bpe_cut(&w->model, word, bytes, found);
    return 0;
}

/* Each of two ways of up to `bytes` additions is rounded by at most half of 2^-23 of its sum each time;
   twice that, and well before the sums are brought back to 0. Ways that begin above 0 are never further
   from 0 than their beginning, or than -lowest: the same bound holds on both sides. */
static float far_of(const Words *w, const Cut *found, size_t bytes)
{
    if (w->model.kind == BPE)
        return INFINITY;
    float rounding = found->margin / ((float)bytes * 0x1p-22f) + found->lowest;
    return fminf(rounding, 99900.0f + found->lowest);
}

static uint32_t *put_anew(Words *w, const uint8_t *word, size_t bytes, uint32_t *out, float *sum)
{
    Cut found = {.ids = out};
    if (cut(w, word, bytes, *sum, &found))
        return NULL;
    *sum = found.sum;
    return out + found.count;
}

static uint32_t *put_ids(const Words *w, const uint32_t *ids, uint32_t count, uint32_t *out, float *sum)
{
    for (uint32_t i = 0; i < count; i++) {
        out[i] = ids[i];
        *sum += w->model.scores[ids[i]];
    }
    return out + count;
}

static __attribute__((noinline)) uint32_t *put_long(Words *w, const uint8_t *word, size_t bytes,
                                                    uint32_t *out, float *sum)
{
    if (bytes > LONG_BYTES)
        return put_anew(w, word, bytes, out, sum);
    uint64_t key[LONG_BYTES / 8] = {0}, hash = bytes;
    memcpy(key, word, bytes);
    for (size_t i = 0; 8 * i < bytes; i++)
        hash = mix(hash, key[i]);
    Long *kept = w->longs + (hash & (LONG_TABLE - 1));
    if (kept->bytes != bytes || memcmp(kept->key, key, LONG_BYTES)) {
        uint32_t ids[LONG_BYTES];
        Cut found = {.ids = ids};
        if (cut(w, word, bytes, 0, &found))
            return NULL;
        if (found.count > LONG_IDS)
            return put_anew(w, word, bytes, out, sum);
        memcpy(kept->key, key, LONG_BYTES);
        memcpy(kept->ids, ids, found.count * sizeof *ids);
        kept->far = far_of(w, &found, bytes);
        kept->bytes = (uint8_t)bytes;
        kept->count = (uint8_t)found.count;
    }
    if (!(fabsf(*sum) < kept->far))
        return put_anew(w, word, bytes, out, sum);
    return put_ids(w, kept->ids, kept->count, out, sum);
}

/* Remember a short word, be it only that its ids are too many for this table; -1: out of memory. */
static __attribute__((noinline)) int learn_short(Words *w, Short *kept, const uint8_t *word, uint32_t bytes,
                                                 const uint64_t key[2])
{
    uint32_t ids[SHORT_BYTES];
    Cut found = {.ids = ids};
    if (cut(w, word, bytes, 0, &found))
        return -1;
    uint64_t packed = 0;
    for (uint32_t i = SHORT_IDS; i--;)
        packed = packed << ID_BITS | (i < found.count ? ids[i] : w->padding);
    *kept = (Short){{key[0], key[1]}, packed, far_of(w, &found, bytes), (uint8_t)bytes, (uint8_t)found.count};
    return 0;
}

static inline void short_key(const uint8_t *word, uint32_t bytes, uint64_t key[2])
{
    memcpy(key, word, SHORT_BYTES); /* there are as many behind every text */
    uint64_t first = bytes >= 8 ? ~0ull : ~(~0ull << 8 * bytes);
    uint64_t second = bytes <= 8 ? 0 : bytes >= 16 ? ~0ull : ~(~0ull << (8 * bytes & 63));
    key[0] &= first;
    key[1] &= second;
}

/* Where the words of a chunk are in the table of short ones, which is asked for ahead of its use. */
static void look_up(Words *w, const uint8_t *text, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t key[2];
        uint32_t bytes = w->starts[i + 1] - w->starts[i];
        short_key(text + w->starts[i], bytes, key);
        w->places[i] = (uint32_t)mix(key[0] + bytes, key[1]) & (SHORT_TABLE - 1);
        __builtin_prefetch(w->shorts + w->places[i]);
    }
}

/* The words of a chunk: ids to `out`, their end is returned; NULL: out of memory. */
static uint32_t *put_words(Words *w, const uint8_t *text, uint32_t count, uint32_t *out, float *before)
{
    const float *scores = w->model.scores;
    float sum = *before;
    look_up(w, text, count);
    for (uint32_t i = 0; out && i < count; i++) {
        const uint8_t *word = text + w->starts[i];
        uint32_t bytes = w->starts[i + 1] - w->starts[i];
        if (bytes > SHORT_BYTES) {
            out = put_long(w, word, bytes, out, &sum);
            continue;
        }
        uint64_t key[2];
        short_key(word, bytes, key);
        Short *kept = w->shorts + w->places[i];
        if (((kept->key[0] ^ key[0]) | (kept->key[1] ^ key[1]) | (kept->bytes ^ bytes)) &&
            learn_short(w, kept, word, bytes, key))
            return NULL;
        if (kept->count > SHORT_IDS) {
            out = put_long(w, word, bytes, out, &sum);
            continue;
        }
        if (!(fabsf(sum) < kept->far)) {
            out = put_anew(w, word, bytes, out, &sum);
            continue;
        }
        uint64_t ids = kept->ids;
        uint32_t first = ids & ID_MASK, second = ids >> ID_BITS & ID_MASK, third = (uint32_t)(ids >> 2 * ID_BITS);
        out[0] = first; /* all three: those too many are written over */
        out[1] = second;
        out[2] = third;
        sum += scores[first];
        sum += scores[second];
        sum += scores[third];
        out += kept->count;
    }
    *before = sum;
    return out;
}

/* ---- the door ---- */

void words_free(Words *w)
{
    if (!w)
        return;
    scratch_free(&w->model.scratch);
    void *all[] = {w->model.trie.cells, w->model.trie.ids, w->cuts.pairs, w->cuts.inside,
                   w->shorts, w->longs, w};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* Pieces: UTF-8 end to end in `text`, U+2581 as a blank, sorted by bytes, each ending at ends[i]; their ids
   are below 2^21. scores [ids + 1]: the last is 0; the bytes of an unknown character together add its score.
   Scores, ranks and byte ids stay the caller's, and must stay. NULL: out of memory. */
Words *words_new(int kind, const uint8_t *text, const int64_t *ends, const int32_t *ids, int64_t count,
                 const float *scores, const uint32_t *ranks, uint32_t padding, float unknown_score,
                 const uint32_t *byte_ids)
{
    Words *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->model = (Model){.kind = kind, .scores = scores, .ranks = ranks, .unknown_score = unknown_score,
                       .byte_ids = byte_ids};
    w->padding = padding;
    w->shorts = calloc(SHORT_TABLE, sizeof *w->shorts);
    w->longs = calloc(LONG_TABLE, sizeof *w->longs);
    if (!w->shorts || !w->longs || learn_cuts(&w->cuts, text, ends, count) ||
        trie_build(&w->model.trie, text, ends, ids, count)) {
        words_free(w);
        return NULL;
    }
    return w;
}

static uint32_t *put_text(Words *w, const uint8_t *text, const uint8_t *end, uint32_t *out)
{
    float sum = 0;
    while (out && text < end) {
        uint32_t bytes = (size_t)(end - text) < CHUNK ? (uint32_t)(end - text) : CHUNK;
        uint32_t count = find_words(&w->cuts, text, bytes, w->starts);
        if (text + bytes < end)
            count--; /* the last may go on */
        else
            w->starts[count] = bytes;
        if (count) {
            out = put_words(w, text, count, out, &sum);
            text += w->starts[count];
            continue;
        }
        const uint8_t *next = text + bytes;
        while (next < end && !at_a_cut(&w->cuts, next))
            next++;
        out = put_anew(w, text, (size_t)(next - text), out, &sum);
        text = next;
    }
    return out;
}

/* Texts, valid UTF-8 end to end with U+2581 as a blank and SHORT_BYTES more bytes behind the last -> ids to
   `out`, which has room for as many as there are bytes, and 3; how many each text has to `lengths`.
   Returns how many there are, -1: out of memory. */
int64_t words_encode(Words *w, const uint8_t *text, const int64_t *ends, int64_t count, uint32_t *out,
                     int64_t *lengths)
{
    uint32_t *at = out;
    int64_t start = 0;
    for (int64_t i = 0; i < count; start = ends[i++]) {
        uint32_t *next = put_text(w, text + start, text + ends[i], at);
        if (!next)
            return -1;
        lengths[i] = next - at;
        at = next;
    }
    return at - out;
}
