/* BPE: repeatedly merge the pair of neighboring symbols that forms the piece of the best score, the leftmost of
   equal ones, until no pair forms a piece; as sentencepiece 0.2.3 does. */
#include <string.h>

#include "wordwise.h"

/* Min-heap of candidate pairs: inverted rank in the high half, position of the left symbol in the low half. */
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

/* The symbols of a word. The symbol that starts at byte i has sizes[i] bytes (0: merged into its left neighbor) and
   follows symbol before[i]; states[i] is its trie state, joined[i] that of it and the next symbol together, -1 if
   there is no such state. */
typedef struct {
    const Model *model;
    const uint8_t *word;
    size_t bytes;
    int32_t *states, *joined;
    uint32_t *sizes, *before;
    Heap heap;
} Symbols;

/* Id of the piece that a symbol and the next one form; -1: none. */
static inline int32_t joined_id(const Symbols *sym, size_t left)
{
    return sym->joined[left] < 0 ? -1 : sym->model->trie.ids[sym->joined[left]];
}

/* Push the pair of a symbol and the next one if they form a piece. */
static void push_pair(Symbols *sym, size_t left)
{
    size_t right = left + sym->sizes[left], end = right;
    int32_t state = -1;
    if (right < sym->bytes) {
        state = sym->states[left];
        end += sym->sizes[right];
    }
    for (size_t i = right; state >= 0 && i < end; i++)
        state = trie_step(&sym->model->trie, state, sym->word[i]);
    sym->joined[left] = state;
    int32_t id = joined_id(sym, left);
    if (id >= 0)
        push(&sym->heap, (uint64_t)~sym->model->ranks[id] << 32 | left);
}

/* One symbol per character. */
static void split_into_characters(Symbols *sym)
{
    size_t last = 0;
    for (size_t at = 0; at < sym->bytes;) {
        size_t size = char_bytes(sym->word[at]);
        if (size > sym->bytes - at)
            size = sym->bytes - at;
        int32_t state = 0;
        for (size_t i = at; state >= 0 && i < at + size; i++)
            state = trie_step(&sym->model->trie, state, sym->word[i]);
        sym->states[at] = state;
        sym->sizes[at] = (uint32_t)size;
        sym->before[at] = (uint32_t)last;
        last = at;
        at += size;
    }
}

/* Merge a symbol with the next one, and push the pairs with its new neighbors. */
static void merge(Symbols *sym, size_t left)
{
    size_t right = left + sym->sizes[left];
    sym->states[left] = sym->joined[left];
    sym->sizes[left] += sym->sizes[right];
    sym->sizes[right] = 0;
    if (left + sym->sizes[left] < sym->bytes)
        sym->before[left + sym->sizes[left]] = (uint32_t)left;
    if (left)
        push_pair(sym, sym->before[left]);
    push_pair(sym, left);
}

/* Return whether a pair from the heap still exists; an earlier merge may have consumed one of its symbols. */
static int is_current(const Symbols *sym, size_t left, uint32_t rank)
{
    int32_t id = sym->sizes[left] ? joined_id(sym, left) : -1;
    return id >= 0 && sym->model->ranks[id] == rank;
}

/* Segment a word. result->ids has room for `bytes` ids; the scratch fits the word. */
void bpe_segment(Model *model, const uint8_t *word, size_t bytes, Segmentation *result)
{
    Scratch *s = &model->scratch;
    Symbols sym = {model, word, bytes, s->states, s->joined, s->from, s->ids, {s->heap, 0}};
    /* 1. split into characters and collect the pairs that form a piece */
    memset(sym.sizes, 0, bytes * sizeof *sym.sizes);
    split_into_characters(&sym);
    for (size_t at = 0; at < bytes; at += sym.sizes[at])
        push_pair(&sym, at);
    /* 2. merge the best pair until the heap is empty */
    while (sym.heap.count) {
        uint64_t top = pop(&sym.heap);
        if (is_current(&sym, (uint32_t)top, ~(uint32_t)(top >> 32)))
            merge(&sym, (uint32_t)top);
    }
    /* 3. write the ids; a symbol that is no piece becomes its bytes */
    *result = (Segmentation){.ids = result->ids};
    for (size_t at = 0; at < bytes; at += sym.sizes[at]) {
        int32_t id = sym.states[at] < 0 ? -1 : model->trie.ids[sym.states[at]];
        if (id >= 0) {
            result->ids[result->count++] = (uint32_t)id;
        } else {
            result->count += emit_bytes(model, word + at, sym.sizes[at], result->ids + result->count);
        }
    }
}
