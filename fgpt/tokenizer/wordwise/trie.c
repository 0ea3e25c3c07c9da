/* The pieces of a vocabulary as a double array. */
#include <stdlib.h>
#include <string.h>

#include "words.h"

/* Pieces [first, last) share the first `depth` bytes, which lead to `state`. */
typedef struct {
    int64_t first, last, depth;
    int32_t state;
} Range;

typedef struct {
    Trie *trie;
    const uint8_t *text;
    const int64_t *ends;
    uint32_t free_from; /* no cell before it is worth a look */
} Builder;

static const uint8_t *piece_at(const Builder *b, int64_t i, int64_t *bytes)
{
    int64_t start = i ? b->ends[i - 1] : 0;
    *bytes = b->ends[i] - start;
    return b->text + start;
}

static int grow(Trie *trie, uint32_t size)
{
    if (size <= trie->size)
        return 0;
    uint32_t wanted = size + size / 2 + 1024;
    Cell *cells = realloc(trie->cells, wanted * sizeof *cells);
    if (cells)
        trie->cells = cells;
    int32_t *ids = realloc(trie->ids, wanted * sizeof *ids);
    if (ids)
        trie->ids = ids;
    if (!cells || !ids)
        return -1;
    for (uint32_t i = trie->size; i < wanted; i++) {
        cells[i] = (Cell){0, -1};
        ids[i] = -1;
    }
    trie->size = wanted;
    return 0;
}

/* The first `next` for which the cells of all these bytes are free; 0: out of memory. */
static uint32_t place(Builder *b, const uint8_t *bytes, int count)
{
    uint32_t busy = 0, first = b->free_from;
    for (uint32_t cell = first;; cell++) {
        if (grow(b->trie, cell + 512))
            return 0;
        if (b->trie->cells[cell].parent != -1) {
            busy++;
            continue;
        }
        if (cell <= bytes[0])
            continue;
        uint32_t next = cell - bytes[0];
        int fits = 1;
        for (int i = 1; fits && i < count; i++)
            fits = b->trie->cells[next + bytes[i]].parent == -1;
        if (!fits)
            continue;
        if (busy > (cell - first + 1) / 20 * 19) /* nearly full so far */
            b->free_from = cell;
        return next;
    }
}

/* Give every byte that follows in [range.first, range.last) a cell; the ranges behind them to `out`. */
static int children(Builder *b, Range range, Range *out)
{
    uint8_t bytes[256];
    int count = 0;
    for (int64_t i = range.first; i < range.last; i++) {
        int64_t size;
        const uint8_t *piece = piece_at(b, i, &size);
        if (size == range.depth)
            continue; /* ends here: the first of them, for they are sorted */
        if (!count || bytes[count - 1] != piece[range.depth]) {
            bytes[count] = piece[range.depth];
            out[count++] = (Range){i, i, range.depth + 1, 0};
        }
        out[count - 1].last = i + 1;
    }
    if (!count)
        return 0;
    uint32_t next = place(b, bytes, count);
    if (!next)
        return -1;
    b->trie->cells[range.state].next = next;
    for (int i = 0; i < count; i++) {
        out[i].state = (int32_t)(next + bytes[i]);
        b->trie->cells[out[i].state].parent = range.state;
    }
    return count;
}

/* Pieces must be sorted by their bytes and differ. Level by level: what texts meet most lies together. */
int trie_build(Trie *trie, const uint8_t *text, const int64_t *ends, const int32_t *ids, int64_t count)
{
    Builder b = {trie, text, ends, 1};
    int64_t room = ends[count - 1] + 257, head = 0, tail = 0;
    Range *queue = malloc((size_t)room * sizeof *queue); /* no more states than bytes */
    if (!queue || grow(trie, 1024)) {
        free(queue);
        return -1;
    }
    trie->cells[0].parent = -2; /* owned, and nobody's child */
    queue[tail++] = (Range){0, count, 0, 0};
    while (head < tail) {
        Range range = queue[head++], found[256];
        int64_t size;
        piece_at(&b, range.first, &size);
        if (size == range.depth)
            trie->ids[range.state] = ids[range.first];
        int some = children(&b, range, found);
        if (some < 0) {
            free(queue);
            return -1;
        }
        memcpy(queue + tail, found, (size_t)some * sizeof *found);
        tail += some;
    }
    free(queue);
    return 0;
}
