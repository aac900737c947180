// Attention of up to eight queries that share a head's keys and values, over the paged cache of half floats.
//
// A block holds 16 tokens of one head: keys [head_dim][16], so that a lane is a token, values [16][head_dim]. The
// tokens are taken in parts of 256 counted from the sequence's first; each part has a softmax of its own, and parts
// are merged in order (Milakov and Gimelshein 2018; Dao et al. 2022). What a query yields depends on nothing else in
// the batch, nor on which thread takes which part.
#pragma once

#include "simd.h"

constexpr int BLOCK_TOKENS = 16;
constexpr int PART_TOKENS = 256;
constexpr int MAX_QUERIES = 8;
constexpr int MAX_HEAD_DIM = 256;

// A softmax over some tokens: the largest score, the sum of exponentials against it, the weighted values.
struct Partial {
    float largest;
    float sum;
    float values[MAX_HEAD_DIM];

    void clear() { sum = 0; }

    void merge(const Partial& other, int head_dim) {
        if (other.sum == 0) return;
        if (sum == 0) {
            largest = other.largest;
            sum = other.sum;
            std::memcpy(values, other.values, head_dim * sizeof(float));
            return;
        }
        const float common = largest > other.largest ? largest : other.largest;
        const float mine = exp16(splat(largest - common))[0], its = exp16(splat(other.largest - common))[0];
        sum = sum * mine + other.sum * its;
        for (int at = 0; at < head_dim; at += LANES) {
            const f32x16 scaled = load<f32x16>(values + at) * mine;
            store(values + at, fma16(load<f32x16>(other.values + at), splat(its), scaled));
        }
        largest = common;
    }
};

// One query: its vector (scaled), and the tokens [begin, end) it sees.
struct Query {
    const float* vector;
    int begin;
    int end;
};

struct HeadCache {
    const uint16_t* keys;    // of this head: [slots][head_dim], a block's keys transposed
    const uint16_t* values;  // of this head: [slots][head_dim]
    const int32_t* blocks;
    int head_dim;
    float softcap;
};

static inline f32x16 capped(f32x16 score, float softcap) {
    const f32x16 x = score * (1.0f / softcap);
    const f32x16 t = exp16(max16(x, -x) * -2.0f);
    const f32x16 tanh = (splat(1.0f) - t) / (splat(1.0f) + t);
    return (x < 0 ? -tanh : tanh) * softcap;
}

static inline i32x16 lane_numbers() {
    return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

template <int NUM_QUERIES>
static void scores_of_block(const HeadCache& cache, const Query* queries, int block, float (*scores)[PART_TOKENS],
                            int at) {
    const uint16_t* keys = cache.keys + (int64_t)cache.blocks[block] * BLOCK_TOKENS * cache.head_dim;
    f32x16 even[NUM_QUERIES] = {}, odd[NUM_QUERIES] = {};
    for (int d = 0; d < cache.head_dim; d += 2) {
        const f32x16 key = load_half(keys + d * BLOCK_TOKENS), next = load_half(keys + (d + 1) * BLOCK_TOKENS);
        for (int query = 0; query < NUM_QUERIES; query++) {
            even[query] = fma16(splat(queries[query].vector[d]), key, even[query]);
            odd[query] = fma16(splat(queries[query].vector[d + 1]), next, odd[query]);
        }
    }
    for (int query = 0; query < NUM_QUERIES; query++) {
        f32x16 score = even[query] + odd[query];
        if (cache.softcap > 0) score = capped(score, cache.softcap);
        store(scores[query] + at, score);
    }
}

template <int NUM_QUERIES, int NUM_VECTORS>
static void weighted_values(const HeadCache& cache, int first, int end, const float (*weights)[PART_TOKENS], int from,
                            Partial* partials) {
    f32x16 totals[NUM_QUERIES][NUM_VECTORS] = {};
    const int base = first / PART_TOKENS * PART_TOKENS;
    for (int token = first; token < end; token++) {
        const int64_t slot = (int64_t)cache.blocks[token / BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS;
        const uint16_t* values = cache.values + slot * cache.head_dim + from;
        f32x16 value[NUM_VECTORS];
        for (int v = 0; v < NUM_VECTORS; v++) value[v] = load_half(values + v * LANES);
        for (int query = 0; query < NUM_QUERIES; query++) {
            const f32x16 weight = splat(weights[query][token - base]);
            for (int v = 0; v < NUM_VECTORS; v++) totals[query][v] = fma16(weight, value[v], totals[query][v]);
        }
    }
    for (int query = 0; query < NUM_QUERIES; query++)
        for (int v = 0; v < NUM_VECTORS; v++) store(partials[query].values + from + v * LANES, totals[query][v]);
}

// The part of 256 tokens that starts at `base`, for each query its own tokens of it.
template <int NUM_QUERIES>
static void attend_part(const HeadCache& cache, const Query* queries, int base, Partial* partials) {
    alignas(64) float scores[NUM_QUERIES][PART_TOKENS];
    int first = base + PART_TOKENS, end = base;
    for (int query = 0; query < NUM_QUERIES; query++) {
        const int begins = queries[query].begin > base ? queries[query].begin : base;
        const int ends = queries[query].end < base + PART_TOKENS ? queries[query].end : base + PART_TOKENS;
        partials[query].clear();
        if (begins >= ends) continue;
        first = begins < first ? begins : first;
        end = ends > end ? ends : end;
    }
    if (first >= end) return;
    const int first_block = first / BLOCK_TOKENS, end_block = (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    for (int block = first_block; block < end_block; block++)
        scores_of_block<NUM_QUERIES>(cache, queries, block, scores, block * BLOCK_TOKENS - base);
    for (int query = 0; query < NUM_QUERIES; query++) {
        const int begins = queries[query].begin, ends = queries[query].end;
        f32x16 largest = splat(-INFINITY);
        for (int block = first_block; block < end_block; block++) {
            const i32x16 token = lane_numbers() + block * BLOCK_TOKENS;
            const f32x16 score = load<f32x16>(scores[query] + block * BLOCK_TOKENS - base);
            const f32x16 seen = (token >= begins) & (token < ends) ? score : splat(-INFINITY);
            store(scores[query] + block * BLOCK_TOKENS - base, seen);
            largest = max16(seen, largest);
        }
        const float bound = max_of(largest);
        f32x16 sum = {};
        for (int block = first_block; block < end_block; block++) {
            float* at = scores[query] + block * BLOCK_TOKENS - base;
            const f32x16 score = load<f32x16>(at);
            // A token outside has no weight at all, not a very small one.
            const f32x16 weight = score == splat(-INFINITY) ? f32x16{} : exp16(score - bound);
            store(at, weight);
            sum += weight;
        }
        partials[query].largest = bound;
        partials[query].sum = sum_of(sum);
    }
    int from = 0;
    for (; from + 2 * LANES <= cache.head_dim; from += 2 * LANES)
        weighted_values<NUM_QUERIES, 2>(cache, first, end, scores, from, partials);
    if (from < cache.head_dim) weighted_values<NUM_QUERIES, 1>(cache, first, end, scores, from, partials);
}

static inline void attend(const HeadCache& cache, const Query* queries, int num_queries, int base, Partial* partials) {
    switch (num_queries) {
        case 1: return attend_part<1>(cache, queries, base, partials);
        case 2: return attend_part<2>(cache, queries, base, partials);
        case 3: return attend_part<3>(cache, queries, base, partials);
        case 4: return attend_part<4>(cache, queries, base, partials);
        case 5: return attend_part<5>(cache, queries, base, partials);
        case 6: return attend_part<6>(cache, queries, base, partials);
        case 7: return attend_part<7>(cache, queries, base, partials);
        default: return attend_part<8>(cache, queries, base, partials);
    }
}
