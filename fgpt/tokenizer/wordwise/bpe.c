/* BPE: of all pairs of neighbours that make a piece, the one of the best score is merged, the leftmost
   of equals, until none is left; as sentencepiece 0.2.3 does. */
#include <string.h>

#include "words.h"

/* A heap of pairs, the best at the top: rank inverted, then the position of the left one. */
typedef struct {
    uint64_t *items;
    size_t count;
} Heap;

static void push(Heap *heap, uint64_t item)
{
    size_t at = heap->count++;
    for (; at && heap->items[(at - 1) / 2] > item; at = (at - 1) / 2)
        heap->items[at] = heap->items[(at - 1) / 2];
    heap->items[at] = item;
}

static uint64_t pop(Heap *heap)
{
    uint64_t top = heap->items[0], last = heap->items[--heap->count];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < heap->count; at = child) {
        if (child + 1 < heap->count && heap->items[child + 1] < heap->items[child])
            child++;
        if (heap->items[child] >= last)
            break;
        heap->items[at] = heap->items[child];
    }
    heap->items[at] = last;
    return top;
}

/* A symbol begins at byte i and has sizes[i] bytes, 0: merged away; states[i] is where its bytes lead in
   the trie, joined[i] where they lead with the next symbol's, -1: nowhere. before[i]: the symbol in front. */
typedef struct {
    const Model *model;
    const uint8_t *word;
    size_t bytes;
    int32_t *states, *joined;
    uint32_t *sizes, *before;
    Heap heap;
} Merging;

/* The piece that a symbol and the next make, -1: none. */
static inline int32_t piece_of(const Merging *m, size_t left)
{
    return m->joined[left] < 0 ? -1 : m->model->trie.ids[m->joined[left]];
}

static void consider(Merging *m, size_t left)
{
    size_t right = left + m->sizes[left], end = right;
    int32_t state = -1;
    if (right < m->bytes) {
        state = m->states[left];
        end += m->sizes[right];
    }
    for (size_t i = right; state >= 0 && i < end; i++)
        state = trie_step(&m->model->trie, state, m->word[i]);
    m->joined[left] = state;
    int32_t id = piece_of(m, left);
    if (id >= 0)
        push(&m->heap, (uint64_t)~m->model->ranks[id] << 32 | left);
}

static void split(Merging *m)
{
    size_t last = 0;
    for (size_t at = 0; at < m->bytes;) {
        size_t size = char_bytes(m->word[at]);
        if (size > m->bytes - at)
            size = m->bytes - at;
        int32_t state = 0;
        for (size_t i = at; state >= 0 && i < at + size; i++)
            state = trie_step(&m->model->trie, state, m->word[i]);
        m->states[at] = state;
        m->sizes[at] = (uint32_t)size;
        m->before[at] = (uint32_t)last;
        last = at;
        at += size;
    }
}

static void merge(Merging *m, size_t left)
{
    size_t right = left + m->sizes[left];
    m->states[left] = m->joined[left];
    m->sizes[left] += m->sizes[right];
    m->sizes[right] = 0;
    if (left + m->sizes[left] < m->bytes)
        m->before[left + m->sizes[left]] = (uint32_t)left;
    if (left)
        consider(m, m->before[left]);
    consider(m, left);
}

/* Whether a pair from the heap is one of neighbours still: what they make has that rank. */
static int is_current(const Merging *m, size_t left, uint32_t rank)
{
    int32_t id = m->sizes[left] ? piece_of(m, left) : -1;
    return id >= 0 && m->model->ranks[id] == rank;
}

/* `cut->ids` has room for `bytes`; scratch fits the word. */
void bpe_cut(Model *model, const uint8_t *word, size_t bytes, Cut *cut)
{
    Scratch *s = &model->scratch;
    Merging m = {model, word, bytes, s->states, s->joined, s->from, s->ids, {s->heap, 0}};
    memset(m.sizes, 0, bytes * sizeof *m.sizes);
    split(&m);
    for (size_t at = 0; at < bytes; at += m.sizes[at])
        consider(&m, at);
    while (m.heap.count) {
        uint64_t top = pop(&m.heap);
        if (is_current(&m, (uint32_t)top, ~(uint32_t)(top >> 32)))
            merge(&m, (uint32_t)top);
    }
    *cut = (Cut){.ids = cut->ids};
    for (size_t at = 0; at < bytes; at += m.sizes[at]) {
        int32_t id = m.states[at] < 0 ? -1 : model->trie.ids[m.states[at]];
        if (id >= 0) {
            cut->ids[cut->count++] = (uint32_t)id;
        } else {
            cut->count += put_bytes(model, word + at, m.sizes[at], cut->ids + cut->count);
        }
    }
}
