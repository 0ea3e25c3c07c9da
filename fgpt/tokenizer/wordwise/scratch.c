/* Room to cut a word in. */
#include <stdlib.h>

#include "words.h"

/* Make room for a word of so many bytes; -1: out of memory, and what was there still is. */
int scratch_fit(Scratch *s, size_t bytes)
{
    if (bytes < s->room)
        return 0;
    size_t room = bytes + bytes / 2 + 256;
    Scratch grown = {
        realloc(s->best, room * sizeof *s->best),     realloc(s->second, room * sizeof *s->second),
        realloc(s->from, room * sizeof *s->from),     realloc(s->ids, room * sizeof *s->ids),
        realloc(s->states, room * sizeof *s->states), realloc(s->joined, room * sizeof *s->joined),
        realloc(s->heap, 3 * room * sizeof *s->heap), s->room,
    };
    int failed = !grown.best || !grown.second || !grown.from || !grown.ids || !grown.states || !grown.joined || !grown.heap;
    s->best = grown.best ? grown.best : s->best;
    s->second = grown.second ? grown.second : s->second;
    s->from = grown.from ? grown.from : s->from;
    s->ids = grown.ids ? grown.ids : s->ids;
    s->states = grown.states ? grown.states : s->states;
    s->joined = grown.joined ? grown.joined : s->joined;
    s->heap = grown.heap ? grown.heap : s->heap;
    if (!failed)
        s->room = room;
    return failed ? -1 : 0;
}

void scratch_free(Scratch *s)
{
    void *all[] = {s->best, s->second, s->from, s->ids, s->states, s->joined, s->heap};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}
