// Rows of a prompt times tiles of outputs in bfloat16, with the matrix unit of some x86 CPUs (AMX). An input is the sum
// of two bfloat16 numbers (16 bits of it are kept), a packed weight is rounded to one: its 4 or 8 bits and its scale
// are applied once for all rows, which is what makes it several times as fast as whole numbers group by group. The
// results are not those of `matmul.h` bit for bit, so which rows come here must depend on nothing but their place
// in the text. Everywhere else `has_bfloat_unit` is false.
#pragma once

#include "amx.h"

constexpr int BLOCK_ROWS = 32;                     // of inputs, two registers
constexpr int PAIR_TILES = 2;                      // of outputs at a time
constexpr int GROUP_VALUES = GROUP * MATRIX_ROWS;  // of a register

// Inputs in two parts [k/32][rows, filled up][32], high and low.
struct Parts {
    int num_rows;
    uint16_t* high;
    uint16_t* low;

    int64_t at(int group, int row) const { return ((int64_t)group * num_rows + row) * GROUP; }
};

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

static inline bool has_bfloat_unit() { return has_matrix_unit(); }

// Registers 0 to 3 sums [16][16], 4 and 5 inputs [16 rows][32], 6 and 7 weights [16 pairs][16][2].
static inline void configure_bfloat_unit() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
}

static inline f32x16 floats_of(__m256i brains) { return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(brains), 16); }

static inline void split_group(const float* from, uint16_t* high, uint16_t* low) {
    const f32x16 left = load<f32x16>(from), right = load<f32x16>(from + LANES);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    store(high, both);
    const f32x16 left_rest = left - floats_of(_mm512_castsi512_si256(both));
    const f32x16 right_rest = right - floats_of(_mm512_extracti64x4_epi64(both, 1));
    store(low, (__m512i)_mm512_cvtne2ps_pbh((__m512)right_rest, (__m512)left_rest));
}

// Sixteen outputs' weights of two neighbouring inputs, as the unit wants them.
static inline void put_two(f32x16 even, f32x16 odd, uint16_t* to) {
    const __m512i interleaved =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                         18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    store(to, _mm512_permutexvar_epi16(interleaved, both));
}

static inline void round_tile_4(const Weight& weight, const uint8_t* tile, uint16_t* to) {
    const uint16_t* scales = (const uint16_t*)tile;
    const uint16_t* minima = (const uint16_t*)(tile + scales_bytes(weight.k));
    const uint8_t* codes = tile + codes_offset(4, weight.k);
    // A permutation looks at no more than the lowest four bits of a lane: the code.
    const __m512 numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int group = 0; group < weight.k / GROUP; group++, to += GROUP_VALUES) {
        const f32x16 scale = load_half(scales + group * LANES), minimum = load_half(minima + group * LANES);
        for (int pair = 0; pair < 4; pair++) {
            const __m512i both = load<__m512i>(codes + group * 256 + pair * 64);
            f32x16 values[8];
#pragma GCC unroll 8
            for (int nibble = 0; nibble < 8; nibble++)
                values[nibble] = fma16(scale, (f32x16)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4 * nibble), numbers),
                                       minimum);
            // The low halves of four bytes are inputs 0 to 3, the high ones 4 to 7.
            put_two(values[0], values[2], to + (4 * pair + 0) * 32);
            put_two(values[4], values[6], to + (4 * pair + 1) * 32);
            put_two(values[1], values[3], to + (4 * pair + 2) * 32);
            put_two(values[5], values[7], to + (4 * pair + 3) * 32);
        }
    }
}

static inline void round_tile_8(const Weight& weight, const uint8_t* tile, uint16_t* to) {
    const uint16_t* scales = (const uint16_t*)tile;
    const uint8_t* codes = tile + codes_offset(8, weight.k);
    for (int group = 0; group < weight.k / GROUP; group++, to += GROUP_VALUES) {
        const f32x16 scale = load_half(scales + group * LANES);
        for (int four = 0; four < 8; four++) {
            const i32x16 bytes = load<i32x16>(codes + group * 512 + four * 64);
            f32x16 values[4];
#pragma GCC unroll 4
            for (int byte = 0; byte < 4; byte++) values[byte] = scale * to_float((bytes >> (8 * byte) & 255) - 128);
            put_two(values[0], values[1], to + (2 * four + 0) * 32);
            put_two(values[2], values[3], to + (2 * four + 1) * 32);
        }
    }
}

static inline void arrange_tile_16(const Weight& weight, const uint8_t* tile, uint16_t* to) {
    for (int i = 0; i < weight.k; i += 2, to += 2 * LANES) {
        const uint16_t* from = (const uint16_t*)tile + (int64_t)i * LANES;
        const __m512i even = _mm512_cvtepu16_epi32(load<__m256i>(from));
        const __m512i odd = _mm512_cvtepu16_epi32(load<__m256i>(from + LANES));
        store(to, _mm512_or_epi32(even, _mm512_slli_epi32(odd, 16)));
    }
}

// A tile's weights [k/32][16 pairs][16][2].
static inline void bfloats_of_tile(const Weight& weight, int tile, uint16_t* to) {
    const uint8_t* data = tile_of(weight, tile);
    switch (weight.bits) {
        case 4: return round_tile_4(weight, data, to);
        case 8: return round_tile_8(weight, data, to);
        default: return arrange_tile_16(weight, data, to);
    }
}

// Rows [first, first + 32) times two tiles; `out` [2 tiles][32 rows].
static inline void multiply_block(const uint16_t* weights, int k, const Parts& parts, int first, f32x16* out) {
    finish_stores();
    const uint16_t* second = weights + (int64_t)k * LANES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int group = 0; group < k / GROUP; group++) {
        const int64_t at = parts.at(group, first), below = at + MATRIX_ROWS * GROUP;
        _tile_loadd(6, weights + group * GROUP_VALUES, 64);
        _tile_loadd(7, second + group * GROUP_VALUES, 64);
        _tile_loadd(4, parts.high + at, 64);
        _tile_loadd(5, parts.high + below, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, parts.low + at, 64);
        _tile_loadd(5, parts.low + below, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + MATRIX_ROWS, 64);
    _tile_stored(2, out + BLOCK_ROWS, 64);
    _tile_stored(3, out + BLOCK_ROWS + MATRIX_ROWS, 64);
}

#else

static inline bool has_bfloat_unit() { return false; }
static inline void configure_bfloat_unit() {}
static inline void split_group(const float*, uint16_t*, uint16_t*) {}
static inline void bfloats_of_tile(const Weight&, int, uint16_t*) {}
static inline void multiply_block(const uint16_t*, int, const Parts&, int, f32x16*) {}

#endif
