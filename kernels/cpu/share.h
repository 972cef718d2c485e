/* How a list of units is shared among threads: each walks the whole list and takes the units whose work begins in its
 * part of the sum of all. Costs are in quarter cycles of one core, guessed: only their proportions matter. */
#ifndef LORAPLEX_SHARE_H
#define LORAPLEX_SHARE_H

#include <stdint.h>

/* A thread reads about 6 bytes a cycle, and multiplies and adds about 12 pairs of numbers. */
#define COST(bytes, products) ((bytes) * 2 / 3 + (products) / 3)
#define WORTH_SHARING 100000 /* below this, waking threads takes longer than the work */

/* Threads for work of this cost. */
static inline int worth(int64_t cost, int32_t threads) { return cost < WORTH_SHARING ? 1 : threads; }

#define PREFETCH(from, at) __builtin_prefetch((const char *)(from) + (at), 0, 2)

typedef struct {
    int64_t from, to, passed;
} Share;

static inline Share share_of(int64_t whole, int64_t thread, int64_t threads) {
    return (Share){whole * thread / threads, whole * (thread + 1) / threads, 0};
}

static inline int takes(Share *share, int64_t cost) {
    const int64_t at = share->passed;
    share->passed += cost;
    return at >= share->from && at < share->to;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Rows of the next tile where all that cover `left` rows are to be nearly equally high, and none higher than `highest`. */
static inline int64_t tile_height(int64_t left, int64_t highest) {
    const int64_t tiles = (left + highest - 1) / highest;
    return (left + tiles - 1) / tiles;
}

#endif
