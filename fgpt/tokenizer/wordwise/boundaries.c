/* Word boundaries: positions between two characters that no piece of the vocabulary has side by side. */
#include <stdlib.h>
#include <string.h>

#include "wordwise.h"

enum { INSIDE = 0, BOUNDARY = 1, LOOK_UP = 2 };

static uint32_t code_point(const uint8_t *p)
{
    switch (char_bytes(p[0])) {
    case 1: return p[0];
    case 2: return (p[0] & 31u) << 6 | (p[1] & 63u);
    case 3: return (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    default: return (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    }
}

/* The slot that holds this pair of characters, or the empty slot for it; a pair is never 0. */
static uint64_t *find_slot(const Boundaries *b, uint64_t pair)
{
    uint32_t i = (uint32_t)hash_pair(pair, 0) & b->inside_pairs_mask;
    while (b->inside_pairs[i] && b->inside_pairs[i] != pair)
        i = (i + 1) & b->inside_pairs_mask;
    return b->inside_pairs + i;
}

/* The characters on both sides of `at`, as one number. */
static uint64_t pair_at(const uint8_t *at)
{
    const uint8_t *left = at - 1;
    while ((*left & 0xC0) == 0x80)
        left--;
    return 1ull << 63 | (uint64_t)code_point(left) << 32 | code_point(at);
}

int is_boundary(const Boundaries *b, const uint8_t *at)
{
    uint8_t answer = b->byte_pairs[(uint32_t)at[0] << 8 | at[-1]];
    return answer == LOOK_UP ? !*find_slot(b, pair_at(at)) : answer;
}

/* Collect the pairs inside these pieces (arguments as of wordwise_new). Returns -1 if out of memory. */
int boundaries_build(Boundaries *b, const uint8_t *text, const int64_t *ends, int64_t count)
{
    /* 1. allocate; the hash set stays at most half full */
    uint32_t slots = 1024;
    while (slots < 2 * (uint64_t)ends[count - 1])
        slots *= 2;
    b->inside_pairs_mask = slots - 1;
    b->inside_pairs = calloc(slots, sizeof *b->inside_pairs);
    b->byte_pairs = malloc(65536);
    if (!b->inside_pairs || !b->byte_pairs)
        return -1;
    /* 2. default: boundary between ASCII characters, none inside a character, look up the others */
    for (uint32_t right = 0; right < 256; right++)
        for (uint32_t left = 0; left < 256; left++)
            b->byte_pairs[right << 8 | left] =
                (right & 0xC0) == 0x80 ? INSIDE : right >= 0x80 || left >= 0x80 ? LOOK_UP : BOUNDARY;
    /* 3. mark every pair of neighbors in every piece */
    const uint8_t *p = text;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *end = text + ends[i];
        for (p += char_bytes(*p); p < end; p += char_bytes(*p)) {
            if (p[-1] < 0x80 && p[0] < 0x80) {
                b->byte_pairs[(uint32_t)p[0] << 8 | p[-1]] = INSIDE;
            } else {
                uint64_t pair = pair_at(p);
                *find_slot(b, pair) = pair;
            }
        }
        p = end;
    }
    return 0;
}

/* Write the offsets of the words that start in [text, text + bytes) to `starts`. Returns their number. */
uint32_t find_word_starts(const Boundaries *b, const uint8_t *text, uint32_t bytes, uint32_t *starts)
{
    uint32_t count = 1, i;
    uint8_t high = 0;
    starts[0] = 0;
    for (i = 0; i < bytes; i++)
        high |= text[i];
    if (high & 0x80) {
        for (i = 1; i < bytes; i++)
            if (is_boundary(b, text + i))
                starts[count++] = i;
        return count;
    }
    /* all ASCII: branch-free, because boundaries are hard to predict */
    const uint8_t *byte_pairs = b->byte_pairs;
    for (i = 1; i < bytes; i++) {
        uint16_t pair;
        memcpy(&pair, text + i - 1, 2);
        starts[count] = i;
        count += byte_pairs[pair];
    }
    return count;
}
