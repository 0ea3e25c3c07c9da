/* Where a text can be cut: between two characters that no piece of the vocabulary has side by side. */
#include <stdlib.h>
#include <string.h>

#include "words.h"

enum { NO_CUT = 0, A_CUT = 1, ASK = 2 };

static uint32_t code_point(const uint8_t *p)
{
    switch (char_bytes(p[0])) {
    case 1: return p[0];
    case 2: return (p[0] & 31u) << 6 | (p[1] & 63u);
    case 3: return (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    default: return (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    }
}

/* Where this pair of characters is in the set, or would be: pairs are never 0. */
static uint64_t *slot(const Cuts *cuts, uint64_t pair)
{
    uint32_t i = (uint32_t)mix(pair, 0) & cuts->inside_mask;
    while (cuts->inside[i] && cuts->inside[i] != pair)
        i = (i + 1) & cuts->inside_mask;
    return cuts->inside + i;
}

static uint64_t pair_before(const uint8_t *at)
{
    const uint8_t *left = at - 1;
    while ((*left & 0xC0) == 0x80)
        left--;
    return 1ull << 63 | (uint64_t)code_point(left) << 32 | code_point(at);
}

int at_a_cut(const Cuts *cuts, const uint8_t *at)
{
    uint8_t answer = cuts->pairs[(uint32_t)at[0] << 8 | at[-1]];
    return answer == ASK ? !*slot(cuts, pair_before(at)) : answer;
}

int learn_cuts(Cuts *cuts, const uint8_t *text, const int64_t *ends, int64_t count)
{
    uint32_t room = 1024;
    while (room < 2 * (uint64_t)ends[count - 1])
        room *= 2;
    cuts->inside_mask = room - 1;
    cuts->inside = calloc(room, sizeof *cuts->inside);
    cuts->pairs = malloc(65536);
    if (!cuts->inside || !cuts->pairs)
        return -1;
    for (uint32_t right = 0; right < 256; right++)
        for (uint32_t left = 0; left < 256; left++)
            cuts->pairs[right << 8 | left] =
                (right & 0xC0) == 0x80 ? NO_CUT : right >= 0x80 || left >= 0x80 ? ASK : A_CUT;
    const uint8_t *p = text;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *end = text + ends[i];
        for (p += char_bytes(*p); p < end; p += char_bytes(*p)) {
            if (p[-1] < 0x80 && p[0] < 0x80) {
                cuts->pairs[(uint32_t)p[0] << 8 | p[-1]] = NO_CUT;
            } else {
                uint64_t pair = pair_before(p);
                *slot(cuts, pair) = pair;
            }
        }
        p = end;
    }
    return 0;
}

/* Words that begin in [text, text + bytes): their places to `starts`; how many. */
uint32_t find_words(const Cuts *cuts, const uint8_t *text, uint32_t bytes, uint32_t *starts)
{
    uint32_t count = 1, i;
    uint8_t high = 0;
    starts[0] = 0;
    for (i = 0; i < bytes; i++)
        high |= text[i];
    if (high & 0x80) {
        for (i = 1; i < bytes; i++)
            if (at_a_cut(cuts, text + i))
                starts[count++] = i;
        return count;
    }
    const uint8_t *pairs = cuts->pairs;
    for (i = 1; i < bytes; i++) { /* without a branch: cuts cannot be predicted */
        uint16_t pair;
        memcpy(&pair, text + i - 1, 2);
        starts[count] = i;
        count += pairs[pair];
    }
    return count;
}
