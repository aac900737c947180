// A weight matrix [n, k] as the matrix products read it: tiles of 16 outputs, so that a lane is an output.
//
//   bits 4    per tile: scales, minima [k/32][16] half floats, then codes [k/32][256 bytes]
//   bits 8    per tile: scales [k/32][16] half floats, then codes + 128 [k/32][512 bytes]
//   bits 16   per tile: [k][16] bfloat16
//   bits 32   per tile: [k][16] float
//
// Four neighbouring inputs of one output stand together in a lane, as the 8-bit dot product takes them; of 4-bit
// codes, two such groups share a byte's low and high half. Outputs that fill up the last tile are 0.
#pragma once

#include "simd.h"

constexpr int GROUP = 32;

struct Weight {
    int32_t bits;
    int32_t n;
    int32_t k;
    int32_t padding;
    const uint8_t* data;
};

static inline int num_tiles(int n) { return (n + LANES - 1) / LANES; }

static inline int64_t rounded_up(int64_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

static inline int64_t scales_bytes(int k) { return rounded_up((int64_t)k / GROUP * LANES * 2); }

static inline int64_t codes_offset(int bits, int k) { return scales_bytes(k) * (bits == 4 ? 2 : 1); }

static inline int64_t tile_bytes(int bits, int k) {
    if (bits >= 16) return rounded_up((int64_t)k * LANES * bits / 8);
    return codes_offset(bits, k) + (int64_t)k * LANES * bits / 8;
}

static inline const uint8_t* tile_of(const Weight& weight, int tile) {
    return weight.data + tile * tile_bytes(weight.bits, weight.k);
}

static inline int64_t weight_bytes(int bits, int n, int k) { return num_tiles(n) * tile_bytes(bits, k); }

// The last tile may have outputs that are not there.
static inline void clear_last_tile(int bits, int n, int k, uint8_t* out) {
    if (n % LANES) std::memset(out + n / LANES * tile_bytes(bits, k), 0, tile_bytes(bits, k));
}

static inline uint32_t load_u32(const void* from) {
    uint32_t value;
    std::memcpy(&value, from, 4);
    return value;
}

// One group of one output, four codes at a time. Of 4 bits, byte j of the 16 holds codes j (low) and j + 16 (high).
static inline void pack_codes_4(const uint8_t* codes, int lane, uint8_t* out) {
    constexpr uint32_t low = 0x0f0f0f0f;
    for (int half = 0; half < 2; half++) {
        const uint32_t first = load_u32(codes + 8 * half), second = load_u32(codes + 8 * half + 4);
        store(out + half * 64 + lane * 4, (first & low) | (second & low) << 4);
        store(out + (half + 2) * 64 + lane * 4, (first >> 4 & low) | (second & ~low));
    }
}

static inline void pack_codes_8(const uint8_t* codes, int lane, uint8_t* out) {
    for (int four = 0; four < 8; four++) store(out + four * 64 + lane * 4, load_u32(codes + 4 * four) ^ 0x80808080);
}

// `codes` as packed.py has them: 4 bits [n, k/2] in GGUF's order within each 16 bytes, 8 bits [n, k] signed.
static inline void pack_groups(int bits, int n, int k, const uint8_t* codes, const uint16_t* scales,
                               const uint16_t* minima, uint8_t* out) {
    clear_last_tile(bits, n, k, out);
    const int num_groups = k / GROUP, group_bytes = GROUP * bits / 8;
    for (int row = 0; row < n; row++) {
        uint8_t* tile = out + row / LANES * tile_bytes(bits, k);
        const int lane = row % LANES;
        uint16_t* tile_scales = (uint16_t*)tile;
        uint16_t* tile_minima = (uint16_t*)(tile + scales_bytes(k));
        uint8_t* tile_codes = tile + codes_offset(bits, k);
        for (int group = 0; group < num_groups; group++) {
            const int64_t at = (int64_t)row * num_groups + group;
            tile_scales[group * LANES + lane] = scales[at];
            if (bits == 4) tile_minima[group * LANES + lane] = minima ? minima[at] : 0;
            uint8_t* to = tile_codes + group * LANES * group_bytes;
            if (bits == 4)
                pack_codes_4(codes + at * group_bytes, lane, to);
            else
                pack_codes_8(codes + at * group_bytes, lane, to);
        }
    }
}

template <typename Value>
static void pack_values(int n, int k, const Value* values, Value* out) {
    for (int row = 0; row < n; row++) {
        Value* to = (Value*)((uint8_t*)out + row / LANES * tile_bytes(8 * sizeof(Value), k)) + row % LANES;
        for (int i = 0; i < k; i++) to[(int64_t)i * LANES] = values[(int64_t)row * k + i];
    }
}

static inline void pack_floats(int bits, int n, int k, const void* values, uint8_t* out) {
    clear_last_tile(bits, n, k, out);
    if (bits == 16)
        pack_values(n, k, (const uint16_t*)values, (uint16_t*)out);
    else
        pack_values(n, k, (const float*)values, (float*)out);
}

// One row of the matrix as floats: a token's embedding.
static inline void unpack_row(const Weight& weight, int row, float* out) {
    const uint8_t* tile = tile_of(weight, row / LANES);
    const int lane = row % LANES;
    for (int i = 0; i < weight.k; i++) {
        const int group = i / GROUP, four = i % GROUP / 4, byte = i % 4;
        if (weight.bits == 32) {
            std::memcpy(out + i, tile + ((int64_t)i * LANES + lane) * 4, 4);
        } else if (weight.bits == 16) {
            const uint32_t bits = (uint32_t)((const uint16_t*)tile)[(int64_t)i * LANES + lane] << 16;
            std::memcpy(out + i, &bits, 4);
        } else {
            const uint8_t* codes = tile + codes_offset(weight.bits, weight.k);
            const float scale = half_to_float(((const uint16_t*)tile)[group * LANES + lane]);
            if (weight.bits == 8) {
                out[i] = scale * (codes[group * 512 + four * 64 + lane * 4 + byte] - 128);
            } else {
                const uint8_t both = codes[group * 256 + four / 2 * 64 + lane * 4 + byte];
                const uint16_t* minima = (const uint16_t*)(tile + scales_bytes(weight.k));
                const float minimum = half_to_float(minima[group * LANES + lane]);
                out[i] = scale * (four % 2 ? both >> 4 : both & 15) + minimum;
            }
        }
    }
}
