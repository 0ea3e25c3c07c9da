/* Text -> ids, word by word, with a cache of words.

   1. Split the text at word boundaries: between two characters that no piece of the vocabulary has side by
      side. No piece crosses such a position, so each word is segmented on its own. (SentencePiece's trainer
      separates letters, digits and signs, which keeps words short and repetitive.)
   2. Look the word up in a cache of fixed size: one table for short words, one for longer words; a new word
      replaces the entry in its slot.
   3. On a miss, segment the word with the model (unigram.c, bpe.c) and store its ids.

   Unigram adds float32 scores from the start of the text, so rounding decides between nearly equal paths, and
   the rounding depends on the sum in front of the word. Each entry therefore stores max_sum: its ids are valid
   while the absolute sum in front of the word is smaller; otherwise the word is segmented again from the true
   sum. The sum can be positive: the library subtracts an offset when sums get too low (unigram.c). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "wordwise.h"

#define ID_BITS 21
#define ID_MASK ((1u << ID_BITS) - 1)

/* ---- one word ---- */

static int segment(Encoder *e, const uint8_t *word, size_t bytes, float sum, Segmentation *result)
{
    if (scratch_reserve(&e->model.scratch, bytes))
        return -1;
    if (e->model.kind == UNIGRAM)
        unigram_segment(&e->model, word, bytes, sum, result);
    else
        bpe_segment(&e->model, word, bytes, result);
    return 0;
}

/* The largest sum in front of the word for which rounding cannot change these ids.

   A path has up to `bytes` additions; each rounds by at most half of 2^-23 of its sum, for each of the two paths
   compared. The bound doubles that, and stays clear of the library's reset at -100000. A path that starts above
   0 stays within max(start, -lowest_sum) of 0, so the bound holds for both signs. */
static float max_safe_sum(const Encoder *e, const Segmentation *result, size_t bytes)
{
    if (e->model.kind == BPE)
        return INFINITY;
    float rounding = result->margin / ((float)bytes * 0x1p-22f) + result->lowest_sum;
    return fminf(rounding, 99900.0f + result->lowest_sum);
}

static uint32_t *emit_uncached(Encoder *e, const uint8_t *word, size_t bytes, uint32_t *out, float *sum)
{
    Segmentation result = {.ids = out};
    if (segment(e, word, bytes, *sum, &result))
        return NULL;
    *sum = result.sum;
    return out + result.count;
}

static uint32_t *emit_ids(const Encoder *e, const uint32_t *ids, uint32_t count, uint32_t *out, float *sum)
{
    for (uint32_t i = 0; i < count; i++) {
        out[i] = ids[i];
        *sum += e->model.scores[ids[i]];
    }
    return out + count;
}

static __attribute__((noinline)) uint32_t *emit_long_word(Encoder *e, const uint8_t *word, size_t bytes,
                                                          uint32_t *out, float *sum)
{
    if (bytes > LONG_BYTES)
        return emit_uncached(e, word, bytes, out, sum);
    uint64_t key[LONG_BYTES / 8] = {0}, hash = bytes;
    memcpy(key, word, bytes);
    for (size_t i = 0; 8 * i < bytes; i++)
        hash = hash_pair(hash, key[i]);
    LongEntry *entry = e->long_entries + (hash & (LONG_ENTRIES - 1));
    if (entry->bytes != bytes || memcmp(entry->key, key, LONG_BYTES)) {
        uint32_t ids[LONG_BYTES];
        Segmentation result = {.ids = ids};
        if (segment(e, word, bytes, 0, &result))
            return NULL;
        if (result.count > LONG_IDS)
            return emit_uncached(e, word, bytes, out, sum);
        memcpy(entry->key, key, LONG_BYTES);
        memcpy(entry->ids, ids, result.count * sizeof *ids);
        entry->max_sum = max_safe_sum(e, &result, bytes);
        entry->bytes = (uint8_t)bytes;
        entry->count = (uint8_t)result.count;
    }
    if (!(fabsf(*sum) < entry->max_sum))
        return emit_uncached(e, word, bytes, out, sum);
    return emit_ids(e, entry->ids, entry->count, out, sum);
}

/* Fill the entry of a short word, even if it has too many ids to store here. Returns -1 if out of memory. */
static __attribute__((noinline)) int fill_short_entry(Encoder *e, ShortEntry *entry, const uint8_t *word,
                                                      uint32_t bytes, const uint64_t key[2])
{
    uint32_t ids[SHORT_BYTES];
    Segmentation result = {.ids = ids};
    if (segment(e, word, bytes, 0, &result))
        return -1;
    uint64_t packed = 0;
    for (uint32_t i = SHORT_IDS; i--;)
        packed = packed << ID_BITS | (i < result.count ? ids[i] : e->zero_score_id);
    *entry = (ShortEntry){{key[0], key[1]}, packed, max_safe_sum(e, &result, bytes), (uint8_t)bytes,
                          (uint8_t)result.count};
    return 0;
}

/* ---- a block of words ---- */

static inline void make_short_key(const uint8_t *word, uint32_t bytes, uint64_t key[2])
{
    memcpy(key, word, SHORT_BYTES); /* the caller pads the text with as many bytes */
    uint64_t first = bytes >= 8 ? ~0ull : ~(~0ull << 8 * bytes);
    uint64_t second = bytes <= 8 ? 0 : bytes >= 16 ? ~0ull : ~(~0ull << (8 * bytes & 63));
    key[0] &= first;
    key[1] &= second;
}

/* Find and prefetch the short entries of all words of a block. */
static void prefetch_entries(Encoder *e, const uint8_t *text, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t key[2];
        uint32_t bytes = e->starts[i + 1] - e->starts[i];
        make_short_key(text + e->starts[i], bytes, key);
        e->slots[i] = (uint32_t)hash_pair(key[0] + bytes, key[1]) & (SHORT_ENTRIES - 1);
        __builtin_prefetch(e->short_entries + e->slots[i]);
    }
}

/* Write the ids of the words of a block. Returns the end of the ids; NULL: out of memory. */
static uint32_t *emit_words(Encoder *e, const uint8_t *text, uint32_t count, uint32_t *out, float *text_sum)
{
    const float *scores = e->model.scores;
    float sum = *text_sum;
    prefetch_entries(e, text, count);
    for (uint32_t i = 0; out && i < count; i++) {
        const uint8_t *word = text + e->starts[i];
        uint32_t bytes = e->starts[i + 1] - e->starts[i];
        if (bytes > SHORT_BYTES) {
            out = emit_long_word(e, word, bytes, out, &sum);
            continue;
        }
        uint64_t key[2];
        make_short_key(word, bytes, key);
        ShortEntry *entry = e->short_entries + e->slots[i];
        if (((entry->key[0] ^ key[0]) | (entry->key[1] ^ key[1]) | (entry->bytes ^ bytes)) &&
            fill_short_entry(e, entry, word, bytes, key))
            return NULL;
        if (entry->count > SHORT_IDS) {
            out = emit_long_word(e, word, bytes, out, &sum);
            continue;
        }
        if (!(fabsf(sum) < entry->max_sum)) {
            out = emit_uncached(e, word, bytes, out, &sum);
            continue;
        }
        uint64_t ids = entry->ids;
        uint32_t first = ids & ID_MASK, second = ids >> ID_BITS & ID_MASK, third = (uint32_t)(ids >> 2 * ID_BITS);
        out[0] = first; /* always write three: the next word overwrites the padding, whose score is 0 */
        out[1] = second;
        out[2] = third;
        sum += scores[first];
        sum += scores[second];
        sum += scores[third];
        out += entry->count;
    }
    *text_sum = sum;
    return out;
}

/* ---- a text ---- */

/* Write the ids of one text to `out`. Returns the end of the ids; NULL: out of memory. */
uint32_t *encode_text(Encoder *e, const uint8_t *text, const uint8_t *end, uint32_t *out)
{
    float sum = 0;
    while (out && text < end) {
        /* 1. find the words of the next block */
        uint32_t bytes = (size_t)(end - text) < BLOCK_BYTES ? (uint32_t)(end - text) : BLOCK_BYTES;
        uint32_t count = find_word_starts(&e->boundaries, text, bytes, e->starts);
        if (text + bytes < end)
            count--; /* the last word may continue in the next block */
        else
            e->starts[count] = bytes;
        /* 2. encode the complete words */
        if (count) {
            out = emit_words(e, text, count, out, &sum);
            text += e->starts[count];
            continue;
        }
        /* 3. or a single word that is longer than a block */
        const uint8_t *next = text + bytes;
        while (next < end && !is_boundary(&e->boundaries, next))
            next++;
        out = emit_uncached(e, text, (size_t)(next - text), out, &sum);
        text = next;
    }
    return out;
}
