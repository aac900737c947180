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

// `codes` as packed.py has them: 4 bits [n, k/2] in GGUF's order within each 16 bytes, 8 bits [n, k] signed.
static inline void pack_groups(int bits, int n, int k, const uint8_t* codes, const uint16_t* scales,
                               const uint16_t* minima, uint8_t* out) {
    std::memset(out, 0, weight_bytes(bits, n, k));
    const int num_groups = k / GROUP;
    for (int row = 0; row < n; row++) {
        uint8_t* tile = out + row / LANES * tile_bytes(bits, k);
        const int lane = row % LANES;
        uint16_t* tile_scales = (uint16_t*)tile;
        uint16_t* tile_minima = (uint16_t*)(tile + scales_bytes(k));
        uint8_t* tile_codes = tile + codes_offset(bits, k);
        for (int group = 0; group < num_groups; group++) {
            tile_scales[group * LANES + lane] = scales[(int64_t)row * num_groups + group];
            if (bits == 4 && minima) tile_minima[group * LANES + lane] = minima[(int64_t)row * num_groups + group];
            for (int i = 0; i < GROUP; i++) {
                const int four = i / 4, byte = i % 4;
                if (bits == 8) {
                    const uint8_t code = codes[(int64_t)row * k + group * GROUP + i] + 128;
                    tile_codes[group * 512 + four * 64 + lane * 4 + byte] = code;
                } else {
                    const uint8_t both = codes[(int64_t)row * k / 2 + group * 16 + i % 16];
                    const uint8_t code = i < 16 ? both & 15 : both >> 4;
                    tile_codes[group * 256 + four / 2 * 64 + lane * 4 + byte] |= code << (four % 2 * 4);
                }
            }
        }
    }
}

static inline void pack_floats(int bits, int n, int k, const void* values, uint8_t* out) {
    std::memset(out, 0, weight_bytes(bits, n, k));
    const int size = bits / 8;
    for (int row = 0; row < n; row++)
        for (int i = 0; i < k; i++)
            std::memcpy(out + row / LANES * tile_bytes(bits, k) + ((int64_t)i * LANES + row % LANES) * size,
                        (const uint8_t*)values + ((int64_t)row * k + i) * size, size);
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
