/* The functions that fgpt/tokenizer/wordwise/encoder.py calls through ctypes, and the Python module around them. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "wordwise.h"

static void *resize(void *buffer, size_t bytes, int *has_failed)
{
    void *resized = realloc(buffer, bytes);
    if (!resized)
        *has_failed = 1;
    return resized ? resized : buffer;
}

/* Grow the buffers to hold a word of this many bytes. Returns -1 if out of memory; the buffers stay valid. */
int scratch_reserve(Scratch *s, size_t bytes)
{
    if (bytes < s->capacity)
        return 0;
    int has_failed = 0;
    size_t capacity = bytes + bytes / 2 + 256;
    s->best = resize(s->best, capacity * sizeof *s->best, &has_failed);
    s->second = resize(s->second, capacity * sizeof *s->second, &has_failed);
    s->from = resize(s->from, capacity * sizeof *s->from, &has_failed);
    s->ids = resize(s->ids, capacity * sizeof *s->ids, &has_failed);
    s->states = resize(s->states, capacity * sizeof *s->states, &has_failed);
    s->joined = resize(s->joined, capacity * sizeof *s->joined, &has_failed);
    s->heap = resize(s->heap, 3 * capacity * sizeof *s->heap, &has_failed);
    if (has_failed)
        return -1;
    s->capacity = capacity;
    return 0;
}

void wordwise_free(Encoder *e)
{
    if (!e)
        return;
    Scratch *s = &e->model.scratch;
    void *buffers[] = {s->best, s->second, s->from, s->ids, s->states, s->joined, s->heap, e->model.trie.cells,
                       e->model.trie.ids, e->boundaries.byte_pairs, e->boundaries.inside_pairs, e->short_entries,
                       e->long_entries, e};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        free(buffers[i]);
}

/* Create an encoder. Returns NULL if out of memory.

   text, ends, ids: the `count` pieces, sorted by their bytes, concatenated as UTF-8 with a blank for U+2581;
     piece i ends at ends[i] and has id ids[i] < 2^21
   scores, ranks [zero_score_id + 1]: by id; see Model. The scores of the byte pieces of an unknown character
     must add up to unknown_score, and scores[zero_score_id] must be 0
   The caller keeps scores, ranks and byte_ids alive until wordwise_free. */
Encoder *wordwise_new(int kind, const uint8_t *text, const int64_t *ends, const int32_t *ids, int64_t count,
                      const float *scores, const uint32_t *ranks, uint32_t zero_score_id, float unknown_score,
                      const uint32_t *byte_ids)
{
    Encoder *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->model = (Model){.kind = kind, .scores = scores, .ranks = ranks, .unknown_score = unknown_score,
                       .byte_ids = byte_ids};
    e->zero_score_id = zero_score_id;
    e->short_entries = calloc(SHORT_ENTRIES, sizeof *e->short_entries);
    e->long_entries = calloc(LONG_ENTRIES, sizeof *e->long_entries);
    if (!e->short_entries || !e->long_entries || boundaries_build(&e->boundaries, text, ends, count) ||
        trie_build(&e->model.trie, text, ends, ids, count)) {
        wordwise_free(e);
        return NULL;
    }
    return e;
}

/* Encode `count` texts. Returns the number of ids; -1: out of memory.

   text: the texts, concatenated as valid UTF-8 with a blank for U+2581, followed by SHORT_BYTES more bytes
   ends: where each text ends
   out: gets the ids; has room for one id per byte, and SHORT_IDS more
   lengths: gets the number of ids of each text */
int64_t wordwise_encode(Encoder *e, const uint8_t *text, const int64_t *ends, int64_t count, uint32_t *out,
                        int64_t *lengths)
{
    uint32_t *at = out;
    int64_t start = 0;
    for (int64_t i = 0; i < count; start = ends[i++]) {
        uint32_t *next = encode_text(e, text + start, text + ends[i], at);
        if (!next)
            return -1;
        lengths[i] = next - at;
        at = next;
    }
    return at - out;
}

/* The module has no functions. Importing it checks that the file fits this Python; SOURCE_HASH shows which
   sources it was built from (setup.py). */
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_wordwise", .m_size = -1};

PyMODINIT_FUNC PyInit__wordwise(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddStringConstant(module, "SOURCE_HASH", SOURCE_HASH)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
