// The input of a matrix product: rows of floats, and the same rows as 8-bit codes with a scale per group of 32, as
// the products with packed weights take them. Each row is rounded by itself, so what it yields depends on no other.
#pragma once

#include <cmath>

#include "weight.h"

struct Rows {
    int k;
    float* values;    // [rows][k]
    int8_t* codes;    // [rows][k]
    float* scales;    // [rows][k/32]
    float* sums;      // [rows][k/32]: scale times the sum of the codes
    int32_t* counts;  // [rows][k/32]: the sum of the codes

    float* row(int index) const { return values + (int64_t)index * k; }

    // Round the groups [first, last) of a row. A group with a value that is not finite keeps that: its scale is NaN.
    void round_groups(int index, int first, int last) const {
        const int num_groups = k / GROUP;
        for (int group = first; group < last; group++) {
            const float* from = row(index) + group * GROUP;
            const f32x16 low = load<f32x16>(from), high = load<f32x16>(from + LANES);
            const f32x16 bound = max16(max16(low, -low), max16(high, -high));
            const float largest = max_of(bound);
            const float check = sum_of(low * 0.0f + high * 0.0f);
            const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
            const float scale = check == 0.0f ? largest / 127.0f : NAN;
            int8_t* to = codes + (int64_t)index * k + group * GROUP;
            const i32x16 low_codes = nearest(low * inverse), high_codes = nearest(high * inverse);
            typedef int8_t i8x16 __attribute__((vector_size(16)));
            store(to, __builtin_convertvector(low_codes, i8x16));
            store(to + LANES, __builtin_convertvector(high_codes, i8x16));
            const i32x16 both = low_codes + high_codes;
            int32_t count = 0;
            for (int lane = 0; lane < LANES; lane++) count += both[lane];
            const int64_t at = (int64_t)index * num_groups + group;
            scales[at] = scale;
            counts[at] = count;
            sums[at] = scale * (float)count;
        }
    }

   private:
    static i32x16 nearest(f32x16 value) {
        const f32x16 shifted = value + splat(12582912.0f);
        return (i32x16)shifted - (i32x16)splat(12582912.0f);
    }
};
