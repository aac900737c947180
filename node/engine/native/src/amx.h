// Sixteen rows times a tile of 16 outputs with the matrix unit of some x86 CPUs (AMX): the same whole numbers as the
// 8-bit dot product gives, so the same bits in the end. Everywhere else `has_matrix_unit` is false.
#pragma once

#include "rows.h"

constexpr int MATRIX_ROWS = 16;
constexpr int MATRIX_SUMS = MATRIX_ROWS * LANES;

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// The kernel gives a process the unit's registers when asked.
static inline bool ask_for_matrix_unit() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static inline bool has_matrix_unit() {
    static const bool has = ask_for_matrix_unit();
    return has;
}

// Loading a register does not tell GCC that memory is read: what was written before must stand there.
static inline void finish_stores() { asm volatile("" : : : "memory"); }

// Once a thread: registers 0 to 3 sums [16][16], 4 and 5 inputs [16 rows][32], 6 and 7 codes [8 fours][16][4].
static inline void configure_matrix_unit() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 32, 32, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 8, 8};
    } shape;
    // GCC 12 believes that only 8 bytes are read, and would drop the rest.
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
}

static inline void release_matrix_unit() { _tile_release(); }

// Codes of one group as bytes [8][64]: 8-bit ones lie so in memory, 4-bit ones are taken apart.
template <int BITS>
static inline const uint8_t* group_bytes(const uint8_t* codes, int group, uint8_t* apart) {
    if constexpr (BITS == 8) return codes + group * 512;
    const u8x64 low = u8x64{} + (uint8_t)15;
    for (int pair = 0; pair < 4; pair++) {
        const u8x64 both = load<u8x64>(codes + group * 256 + pair * 64);
        store(apart + 2 * pair * 64, both & low);
        store(apart + (2 * pair + 1) * 64, (u8x64)((u32x16)both >> 4) & low);
    }
    return apart;
}

template <int BITS>
static inline void add_group(const Weight& weight, const uint8_t* tile, const Rows& rows, int first, int group,
                             const int32_t* sums, f32x16* totals) {
    const int64_t at = (int64_t)group * rows.num_rows + first;
    const f32x16 scale = load_half((const uint16_t*)tile + group * LANES);
    f32x16 minimum;
    if constexpr (BITS == 4) minimum = load_half((const uint16_t*)(tile + scales_bytes(weight.k)) + group * LANES);
#pragma GCC unroll 16
    for (int row = 0; row < MATRIX_ROWS; row++) {
        i32x16 sum = (load<i32x16>(sums + row * LANES) << 8) + load<i32x16>(sums + MATRIX_SUMS + row * LANES);
        if constexpr (BITS == 8) sum -= rows.excess[at + row];
        totals[row] = fma16(to_float(sum), scale * rows.scales[at + row], totals[row]);
        if constexpr (BITS == 4) totals[row] = fma16(minimum, splat(rows.sums[at + row]), totals[row]);
    }
}

// The sums of one group into memory, high bytes and low ones. SIDE 0 or 1: registers of its own, so that two groups
// overlap.
template <int BITS, int SIDE>
static inline void multiply_group(const uint8_t* codes, const Rows& rows, int first, int group, uint8_t* apart,
                                  int32_t* sums) {
    const int8_t* numbers = rows.numbers + ((int64_t)group * rows.num_rows + first) * NUMBER_BYTES;
    const uint8_t* bytes = group_bytes<BITS>(codes, group, apart);
    finish_stores();
    if constexpr (SIDE == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(6, bytes, 64);
        _tile_loadd(4, numbers, NUMBER_BYTES);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(4, numbers + GROUP, NUMBER_BYTES);
        _tile_dpbsud(1, 4, 6);
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + MATRIX_SUMS, 64);
    } else {
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(7, bytes, 64);
        _tile_loadd(5, numbers, NUMBER_BYTES);
        _tile_dpbsud(2, 5, 7);
        _tile_loadd(5, numbers + GROUP, NUMBER_BYTES);
        _tile_dpbsud(3, 5, 7);
        _tile_stored(2, sums, 64);
        _tile_stored(3, sums + MATRIX_SUMS, 64);
    }
}

// The unit works on the next group while the sums of the last are scaled and added.
template <int BITS>
static void matrix_product(const Weight& weight, const uint8_t* tile, const Rows& rows, int first, f32x16* out) {
    alignas(64) int32_t sums[2][2 * MATRIX_SUMS];
    alignas(64) uint8_t apart[2][512];
    const int num_groups = weight.k / GROUP;
    const uint8_t* codes = tile + codes_offset(BITS, weight.k);
    f32x16 totals[MATRIX_ROWS] = {};
    multiply_group<BITS, 0>(codes, rows, first, 0, apart[0], sums[0]);
    for (int group = 0; group < num_groups; group += 2) {
        if (group + 1 < num_groups)
            multiply_group<BITS, 1>(codes, rows, first, group + 1, apart[1], sums[1]);
        add_group<BITS>(weight, tile, rows, first, group, sums[0], totals);
        if (group + 2 < num_groups)
            multiply_group<BITS, 0>(codes, rows, first, group + 2, apart[0], sums[0]);
        if (group + 1 < num_groups) add_group<BITS>(weight, tile, rows, first, group + 1, sums[1], totals);
    }
    for (int row = 0; row < MATRIX_ROWS; row++) out[row] = totals[row];
}

static inline void multiply_matrix(const Weight& weight, const uint8_t* tile, const Rows& rows, int first,
                                   f32x16* out) {
    if (weight.bits == 4)
        matrix_product<4>(weight, tile, rows, first, out);
    else
        matrix_product<8>(weight, tile, rows, first, out);
}

#else

static inline bool has_matrix_unit() { return false; }
static inline void configure_matrix_unit() {}
static inline void release_matrix_unit() {}
static inline void multiply_matrix(const Weight&, const uint8_t*, const Rows&, int, f32x16*) {}

#endif
