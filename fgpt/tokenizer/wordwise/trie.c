/* Builds the double-array trie of the pieces. */
#include <stdlib.h>
#include <string.h>

#include "wordwise.h"

/* Pieces [first, last) share their first `depth` bytes, which lead to `state`. */
typedef struct {
    int64_t first, last, depth;
    int32_t state;
} Range;

typedef struct {
    Trie *trie;
    const uint8_t *text;
    const int64_t *ends;
    uint32_t search_from; /* cells before this one are (nearly) all in use */
} Builder;

static const uint8_t *piece_at(const Builder *b, int64_t i, int64_t *bytes)
{
    int64_t start = i ? b->ends[i - 1] : 0;
    *bytes = b->ends[i] - start;
    return b->text + start;
}

/* Make room for at least `size` cells. Returns -1 if out of memory. */
static int reserve_cells(Trie *trie, uint32_t size)
{
    if (size <= trie->size)
        return 0;
    uint32_t capacity = size + size / 2 + 1024;
    Cell *cells = realloc(trie->cells, capacity * sizeof *cells);
    if (cells)
        trie->cells = cells;
    int32_t *ids = realloc(trie->ids, capacity * sizeof *ids);
    if (ids)
        trie->ids = ids;
    if (!cells || !ids)
        return -1;
    for (uint32_t i = trie->size; i < capacity; i++) {
        cells[i] = (Cell){0, -1};
        ids[i] = -1;
    }
    trie->size = capacity;
    return 0;
}

/* Return the first `next` for which the cells of all these bytes are free; 0: out of memory. */
static uint32_t find_free_base(Builder *b, const uint8_t *bytes, int count)
{
    uint32_t used = 0, first = b->search_from;
    for (uint32_t cell = first;; cell++) {
        if (reserve_cells(b->trie, cell + 512))
            return 0;
        if (b->trie->cells[cell].parent != -1) {
            used++;
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
        if (used > (cell - first + 1) / 20 * 19) /* more than 95% of the cells so far are in use */
            b->search_from = cell;
        return next;
    }
}

/* Give a cell to every byte that continues a piece of the range. Writes one range per child to `out`; returns
   their number, -1 if out of memory. */
static int add_children(Builder *b, Range range, Range *out)
{
    uint8_t bytes[256];
    int count = 0;
    for (int64_t i = range.first; i < range.last; i++) {
        int64_t size;
        const uint8_t *piece = piece_at(b, i, &size);
        if (size == range.depth)
            continue; /* ends in this state; the pieces are sorted, so it is the first of the range */
        if (!count || bytes[count - 1] != piece[range.depth]) {
            bytes[count] = piece[range.depth];
            out[count++] = (Range){i, i, range.depth + 1, 0};
        }
        out[count - 1].last = i + 1;
    }
    if (!count)
        return 0;
    uint32_t next = find_free_base(b, bytes, count);
    if (!next)
        return -1;
    b->trie->cells[range.state].next = next;
    for (int i = 0; i < count; i++) {
        out[i].state = (int32_t)(next + bytes[i]);
        b->trie->cells[out[i].state].parent = range.state;
    }
    return count;
}

/* Build the trie of `count` distinct pieces, sorted by their bytes (arguments as of wordwise_new). Returns -1 if
   out of memory. Breadth first, which keeps the most visited cells close together in memory. */
int trie_build(Trie *trie, const uint8_t *text, const int64_t *ends, const int32_t *ids, int64_t count)
{
    Builder b = {trie, text, ends, 1};
    int64_t capacity = ends[count - 1] + 257, head = 0, tail = 0;
    Range *queue = malloc((size_t)capacity * sizeof *queue); /* at most one state per byte */
    if (!queue || reserve_cells(trie, 1024)) {
        free(queue);
        return -1;
    }
    trie->cells[0].parent = -2; /* in use, but no child of any state */
    queue[tail++] = (Range){0, count, 0, 0};
    while (head < tail) {
        Range range = queue[head++], children[256];
        int64_t size;
        piece_at(&b, range.first, &size);
        if (size == range.depth)
            trie->ids[range.state] = ids[range.first];
        int child_count = add_children(&b, range, children);
        if (child_count < 0) {
            free(queue);
            return -1;
        }
        memcpy(queue + tail, children, (size_t)child_count * sizeof *children);
        tail += child_count;
    }
    free(queue);
    return 0;
}
