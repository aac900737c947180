// Attention of a prompt's rows with the matrix unit (AMX): sixteen queries at a time that share a head's keys and
// values. Like `attention.h` it takes the tokens in parts of 256, each with a softmax of its own, merged in order;
// what a query yields depends on nothing else. Queries, keys, weights and values are each the sum of two bfloat16
// numbers, of whose products the smallest is left out.
#pragma once

#include "amx_bfloat.h"
#include "attention.h"

constexpr int QUERY_TILES = 8;
constexpr int MAX_TASK_QUERIES = QUERY_TILES * MATRIX_ROWS;

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

// Two neighbours of sixteen columns in both parts.
static inline void split_two(f32x16 even, f32x16 odd, uint16_t* high, uint16_t* low) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    put_two(even, odd, high);
    put_two(even - floats_of(_mm512_castsi512_si256(both)), odd - floats_of(_mm512_extracti64x4_epi64(both, 1)), low);
}

// Registers 4 and 5 (both parts) times a tile in both parts, without the product of the low ones.
#define ADD_THREE(sums, high, low) \
    _tile_loadd(6, high, 64);      \
    _tile_loadd(7, low, 64);       \
    _tile_dpbf16ps(sums, 4, 6);    \
    _tile_dpbf16ps(sums, 5, 6);    \
    _tile_dpbf16ps(sums, 4, 7)

// A thread's working memory, for one head size.
class PromptAttention {
   public:
    static bool can(int head_dim) { return has_bfloat_unit() && head_dim % GROUP == 0; }

    // Raises std::bad_alloc; the rest cannot fail.
    void reserve(int head_dim) {
        if (head_dim == head_dim_) return;
        const int64_t part = (int64_t)PART_TOKENS * head_dim;
        for (auto* memory : {&keys_high_, &keys_low_, &values_high_, &values_low_}) memory->resize(part + 64);
        for (auto* memory : {&queries_high_, &queries_low_}) memory->resize(MAX_TASK_QUERIES * head_dim + 64);
        for (auto* memory : {&weights_high_, &weights_low_}) memory->resize(MATRIX_ROWS * PART_TOKENS + 64);
        scores_.resize(MATRIX_ROWS * PART_TOKENS + 64);
        partials_.resize(MATRIX_ROWS);
        totals_.resize(MAX_TASK_QUERIES);
        head_dim_ = head_dim;
    }

    // At most MAX_TASK_QUERIES queries of one sequence; the unit is set up for bfloat16.
    template <typename Put>
    void attend(const HeadCache& cache, const Query* queries, int num_queries, Put put) {
        const int num_tiles = (num_queries + MATRIX_ROWS - 1) / MATRIX_ROWS;
        load_queries(queries, num_queries, num_tiles);
        int begin = queries[0].begin, end = queries[0].end;
        for (int query = 0; query < num_queries; query++) {
            totals_[query].clear();
            begin = std::min(begin, queries[query].begin);
            end = std::max(end, queries[query].end);
        }
        for (int base = begin / PART_TOKENS * PART_TOKENS; base < end; base += PART_TOKENS) {
            const int part_end = std::min(end, base + PART_TOKENS);
            load_keys(cache, base, part_end);
            load_values(cache, base, part_end);
            for (int tile = 0; tile < num_tiles; tile++) {
                const int first = tile * MATRIX_ROWS, count = std::min(MATRIX_ROWS, num_queries - first);
                score(tile, part_end - base);
                weigh(cache, queries + first, count, base, part_end);
                add_values(part_end - base);
                for (int query = 0; query < count; query++)
                    totals_[first + query].merge(partials_[query], head_dim_);
            }
        }
        for (int query = 0; query < num_queries; query++) put(query, totals_[query]);
    }

   private:
    template <typename T>
    static T* aligned(std::vector<T>& memory) {
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    }

    // [tile][head_dim/32][16][32]
    void load_queries(const Query* queries, int num_queries, int num_tiles) {
        uint16_t *high = aligned(queries_high_), *low = aligned(queries_low_);
        std::memset(high, 0, (int64_t)num_tiles * MATRIX_ROWS * head_dim_ * 2);
        std::memset(low, 0, (int64_t)num_tiles * MATRIX_ROWS * head_dim_ * 2);
        for (int query = 0; query < num_queries; query++)
            for (int group = 0; group < head_dim_ / GROUP; group++) {
                const int tile = query / MATRIX_ROWS * (head_dim_ / GROUP) + group;
                const int64_t at = (int64_t)tile * GROUP_VALUES + query % MATRIX_ROWS * GROUP;
                split_group(queries[query].vector + group * GROUP, high + at, low + at);
            }
    }

    // [block][head_dim/2][16][2]
    void load_keys(const HeadCache& cache, int base, int end) {
        uint16_t *high = aligned(keys_high_), *low = aligned(keys_low_);
        for (int token = base; token < end; token += BLOCK_TOKENS) {
            const uint16_t* keys = cache.keys + (int64_t)cache.blocks[token / BLOCK_TOKENS] * BLOCK_TOKENS * head_dim_;
            for (int d = 0; d < head_dim_; d += 2, high += 2 * LANES, low += 2 * LANES)
                split_two(load_half(keys + d * LANES), load_half(keys + (d + 1) * LANES), high, low);
        }
    }

    // [head_dim/16][token/2][16][2]; tokens from `end` on are 0, for what is there may be no number.
    void load_values(const HeadCache& cache, int base, int end) {
        uint16_t *high = aligned(values_high_), *low = aligned(values_low_);
        const int last = base + (end - base + GROUP - 1) / GROUP * GROUP;
        for (int token = base; token < last; token += 2) {
            const uint16_t *even = value_of(cache, token, end), *odd = value_of(cache, token + 1, end);
            for (int from = 0; from < head_dim_; from += LANES) {
                const int64_t at = (int64_t)from * PART_TOKENS + (int64_t)(token - base) * LANES;
                split_two(even ? load_half(even + from) : f32x16{}, odd ? load_half(odd + from) : f32x16{}, high + at,
                          low + at);
            }
        }
    }

    static const uint16_t* value_of(const HeadCache& cache, int token, int end) {
        if (token >= end) return nullptr;
        const int64_t slot = (int64_t)cache.blocks[token / BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS;
        return cache.values + slot * cache.head_dim;
    }

    // scores [16][256], four blocks at a time; those beyond `num_tokens` mean nothing.
    void score(int tile, int num_tokens) {
        finish_stores();
        const int num_groups = head_dim_ / GROUP;
        const uint16_t* queries_high = aligned(queries_high_) + (int64_t)tile * num_groups * GROUP_VALUES;
        const uint16_t* queries_low = aligned(queries_low_) + (int64_t)tile * num_groups * GROUP_VALUES;
        float* scores = aligned(scores_);
        for (int token = 0; token < num_tokens; token += 4 * BLOCK_TOKENS) {
            const uint16_t* keys_high = aligned(keys_high_) + (int64_t)token * head_dim_;
            const uint16_t* keys_low = aligned(keys_low_) + (int64_t)token * head_dim_;
            const int64_t block = (int64_t)BLOCK_TOKENS * head_dim_;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int group = 0; group < num_groups; group++) {
                const uint16_t *high = keys_high + group * GROUP_VALUES, *low = keys_low + group * GROUP_VALUES;
                _tile_loadd(4, queries_high + group * GROUP_VALUES, 64);
                _tile_loadd(5, queries_low + group * GROUP_VALUES, 64);
                ADD_THREE(0, high, low);
                ADD_THREE(1, high + block, low + block);
                ADD_THREE(2, high + 2 * block, low + 2 * block);
                ADD_THREE(3, high + 3 * block, low + 3 * block);
            }
            constexpr int stride = PART_TOKENS * sizeof(float);
            _tile_stored(0, scores + token, stride);
            _tile_stored(1, scores + token + BLOCK_TOKENS, stride);
            _tile_stored(2, scores + token + 2 * BLOCK_TOKENS, stride);
            _tile_stored(3, scores + token + 3 * BLOCK_TOKENS, stride);
        }
    }

    // Scores to weights [token/32][16][32], and each query's largest and sum.
    void weigh(const HeadCache& cache, const Query* queries, int count, int base, int end) {
        uint16_t *high = aligned(weights_high_), *low = aligned(weights_low_);
        const int num_tokens = (end - base + GROUP - 1) / GROUP * GROUP;
        for (int row = 0; row < MATRIX_ROWS; row++) {
            float* scores = aligned(scores_) + row * PART_TOKENS;
            const int begins = row < count ? std::max(queries[row].begin, base) : 0;
            const int ends = row < count ? std::min(queries[row].end, end) : 0;
            partials_[row].clear();
            f32x16 largest = splat(-INFINITY);
            const bool sees_all = begins <= base && ends >= base + num_tokens && cache.softcap <= 0;
            for (int token = 0; sees_all && token < num_tokens; token += LANES)
                largest = max16(load<f32x16>(scores + token), largest);
            for (int token = 0; !sees_all && token < num_tokens; token += LANES) {
                const i32x16 place = lane_numbers() + (base + token);
                f32x16 value = load<f32x16>(scores + token);
                if (cache.softcap > 0) value = capped(value, cache.softcap);
                const f32x16 seen = (place >= begins) & (place < ends) ? value : splat(-INFINITY);
                store(scores + token, seen);
                largest = max16(seen, largest);
            }
            const float bound = begins < ends ? max_of(largest) : 0.0f;
            f32x16 sum = {};
            for (int token = 0; token < num_tokens; token += LANES) {
                const f32x16 value = load<f32x16>(scores + token);
                const f32x16 weight = value == splat(-INFINITY) ? f32x16{} : exp16(value - bound);
                store(scores + token, weight);
                sum += weight;
            }
            partials_[row].largest = bound;
            partials_[row].sum = sum_of(sum);
            for (int step = 0; step < num_tokens / GROUP; step++) {
                const int64_t at = (int64_t)step * GROUP_VALUES + row * GROUP;
                split_group(scores + step * GROUP, high + at, low + at);
            }
        }
    }

    // Weights times values into the partials, four tiles of the head at a time or two.
    void add_values(int num_tokens) {
        const int num_steps = (num_tokens + GROUP - 1) / GROUP;
        int from = 0;
        for (; from + 4 * LANES <= head_dim_; from += 4 * LANES) add_tiles<4>(num_steps, from);
        if (from < head_dim_) add_tiles<2>(num_steps, from);
    }

    template <int NUM_TILES>
    void add_tiles(int num_steps, int from) {
        finish_stores();
        const uint16_t* values_high = aligned(values_high_) + (int64_t)from * PART_TOKENS;
        const uint16_t* values_low = aligned(values_low_) + (int64_t)from * PART_TOKENS;
        constexpr int tile = LANES * PART_TOKENS;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int step = 0; step < num_steps; step++) {
            const int64_t at = (int64_t)step * GROUP_VALUES;
            _tile_loadd(4, aligned(weights_high_) + at, 64);
            _tile_loadd(5, aligned(weights_low_) + at, 64);
            ADD_THREE(0, values_high + at, values_low + at);
            ADD_THREE(1, values_high + tile + at, values_low + tile + at);
            if constexpr (NUM_TILES > 2) {
                ADD_THREE(2, values_high + 2 * tile + at, values_low + 2 * tile + at);
                ADD_THREE(3, values_high + 3 * tile + at, values_low + 3 * tile + at);
            }
        }
        float* out = partials_[0].values + from;
        _tile_stored(0, out, sizeof(Partial));
        _tile_stored(1, out + LANES, sizeof(Partial));
        if constexpr (NUM_TILES > 2) {
            _tile_stored(2, out + 2 * LANES, sizeof(Partial));
            _tile_stored(3, out + 3 * LANES, sizeof(Partial));
        }
    }

    int head_dim_ = 0;
    std::vector<uint16_t> keys_high_, keys_low_, values_high_, values_low_, queries_high_, queries_low_, weights_high_,
        weights_low_;
    std::vector<float> scores_;
    std::vector<Partial> partials_, totals_;
};

#undef ADD_THREE

#else

class PromptAttention {
   public:
    static bool can(int) { return false; }
    void reserve(int) {}
    template <typename Put>
    void attend(const HeadCache&, const Query*, int, Put) {}
};

#endif
