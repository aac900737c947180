// Products of rows with a tile of 16 outputs. Every output is summed over the inputs in one fixed order, whatever the
// number of rows: a row's result is the same bit for bit in any batch.
#pragma once

#include "rows.h"

constexpr int MAX_ROWS_AT_ONCE = 8;

// A group's codes times one row's numbers, in four chains that do not wait for each other.
static inline i32x16 dot_group(i32x16 start, const u8x64* fours, const int8_t* numbers) {
    i32x16 low = start, next_low = {}, high = {}, next_high = {};
    for (int four = 0; four < 8; four += 2) {
        high = dot4(high, fours[four], load_i32(numbers + 4 * four));
        next_high = dot4(next_high, fours[four + 1], load_i32(numbers + 4 * four + 4));
        low = dot4(low, fours[four], load_i32(numbers + GROUP + 4 * four));
        next_low = dot4(next_low, fours[four + 1], load_i32(numbers + GROUP + 4 * four + 4));
    }
    return ((high + next_high) << 8) + (low + next_low);
}

template <int NUM_ROWS>
static void product_4(const Weight& weight, const uint8_t* tile, const Rows& rows, int first, f32x16* out) {
    const int num_groups = weight.k / GROUP;
    const uint16_t* scales = (const uint16_t*)tile;
    const uint16_t* minima = (const uint16_t*)(tile + scales_bytes(weight.k));
    const uint8_t* codes = tile + codes_offset(4, weight.k);
    f32x16 totals[NUM_ROWS] = {};
    const u8x64 low = u8x64{} + (uint8_t)15;
    for (int group = 0; group < num_groups; group++) {
        u8x64 fours[8];
        for (int pair = 0; pair < 4; pair++) {
            const u8x64 both = load<u8x64>(codes + group * 256 + pair * 64);
            fours[2 * pair] = both & low;
            // Shifted as words: there is no shift of bytes.
            fours[2 * pair + 1] = (u8x64)((u32x16)both >> 4) & low;
        }
        const f32x16 scale = load_half(scales + group * LANES), minimum = load_half(minima + group * LANES);
        const int64_t at = (int64_t)group * rows.num_rows + first;
#pragma GCC unroll 8
        for (int row = 0; row < NUM_ROWS; row++) {
            const i32x16 sum = dot_group(i32x16{}, fours, rows.numbers + (at + row) * NUMBER_BYTES);
            totals[row] = fma16(to_float(sum), scale * rows.scales[at + row], totals[row]);
            totals[row] = fma16(minimum, splat(rows.sums[at + row]), totals[row]);
        }
    }
    for (int row = 0; row < NUM_ROWS; row++) out[row] = totals[row];
}

template <int NUM_ROWS>
static void product_8(const Weight& weight, const uint8_t* tile, const Rows& rows, int first, f32x16* out) {
    const int num_groups = weight.k / GROUP;
    const uint16_t* scales = (const uint16_t*)tile;
    const uint8_t* codes = tile + codes_offset(8, weight.k);
    f32x16 totals[NUM_ROWS] = {};
    for (int group = 0; group < num_groups; group++) {
        u8x64 fours[8];
        for (int four = 0; four < 8; four++) fours[four] = load<u8x64>(codes + group * 512 + four * 64);
        const f32x16 scale = load_half(scales + group * LANES);
        const int64_t at = (int64_t)group * rows.num_rows + first;
#pragma GCC unroll 8
        for (int row = 0; row < NUM_ROWS; row++) {
            // The weight's codes stand 128 too high.
            const i32x16 start = i32x16{} - rows.excess[at + row];
            const i32x16 sum = dot_group(start, fours, rows.numbers + (at + row) * NUMBER_BYTES);
            totals[row] = fma16(to_float(sum), scale * rows.scales[at + row], totals[row]);
        }
    }
    for (int row = 0; row < NUM_ROWS; row++) out[row] = totals[row];
}

template <int NUM_ROWS, bool IS_BFLOAT>
static void product_float(const Weight& weight, const uint8_t* tile, const Rows& rows, int first, f32x16* out) {
    f32x16 totals[NUM_ROWS] = {};
    const float* input = rows.row(first);
    for (int i = 0; i < weight.k; i++) {
        f32x16 values;
        if constexpr (IS_BFLOAT)
            values = load_bfloat((const uint16_t*)tile + (int64_t)i * LANES);
        else
            values = load<f32x16>(tile + (int64_t)i * LANES * 4);
#pragma GCC unroll 8
        for (int row = 0; row < NUM_ROWS; row++)
            totals[row] = fma16(splat(input[(int64_t)row * weight.k + i]), values, totals[row]);
    }
    for (int row = 0; row < NUM_ROWS; row++) out[row] = totals[row];
}

template <int NUM_ROWS>
static void product(const Weight& weight, const uint8_t* tile, const Rows& rows, int first, f32x16* out) {
    switch (weight.bits) {
        case 4: return product_4<NUM_ROWS>(weight, tile, rows, first, out);
        case 8: return product_8<NUM_ROWS>(weight, tile, rows, first, out);
        case 16: return product_float<NUM_ROWS, true>(weight, tile, rows, first, out);
        default: return product_float<NUM_ROWS, false>(weight, tile, rows, first, out);
    }
}

// At most MAX_ROWS_AT_ONCE rows from `first` on, times one tile.
static inline void multiply(const Weight& weight, int tile, const Rows& rows, int first, int num_rows, f32x16* out) {
    const uint8_t* data = tile_of(weight, tile);
    switch (num_rows) {
        case 1: return product<1>(weight, data, rows, first, out);
        case 2: return product<2>(weight, data, rows, first, out);
        case 3: return product<3>(weight, data, rows, first, out);
        case 4: return product<4>(weight, data, rows, first, out);
        case 5: return product<5>(weight, data, rows, first, out);
        case 6: return product<6>(weight, data, rows, first, out);
        case 7: return product<7>(weight, data, rows, first, out);
        default: return product<8>(weight, data, rows, first, out);
    }
}
