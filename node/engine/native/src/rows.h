// The input of a matrix product: rows of floats, and the same rows as whole numbers with a scale per group of 32, as
// the products with packed weights take them. A number has 16 bits, in two bytes apart, for an 8-bit dot product each:
// with 8 bits alone one in thirty of a small model's likeliest tokens was another one; with 16 none was.
// Each row is rounded by itself, so what it yields depends on no other.
#pragma once

#include <cmath>

#include "weight.h"

constexpr int NUMBER_BYTES = 2 * GROUP;  // of one group: 32 high bytes, then 32 low ones
constexpr float LARGEST_NUMBER = 127 * 256 + 127;

// Group by group, so that what a product reads of several rows lies together.
struct Rows {
    int num_rows;
    int k;
    float* values;    // [rows][k]
    int8_t* numbers;  // [k/32][rows][64]
    float* scales;    // [k/32][rows]
    float* sums;      // [k/32][rows]: scale times the sum of the numbers
    int32_t* excess;  // [k/32][rows]: 128 times the sum of the numbers

    float* row(int index) const { return values + (int64_t)index * k; }

    // Round the groups [first, last) of a row. A group with a value that is not finite keeps that: its scale is NaN.
    void round_groups(int index, int first, int last) const {
        for (int group = first; group < last; group++) {
            const float* from = row(index) + group * GROUP;
            const f32x16 left = load<f32x16>(from), right = load<f32x16>(from + LANES);
            const float largest = max_of(max16(max16(left, -left), max16(right, -right)));
            const float check = sum_of(left * 0.0f + right * 0.0f);
            const float inverse = largest > 0 ? LARGEST_NUMBER / largest : 0.0f;
            const float scale = check == 0.0f ? largest / LARGEST_NUMBER : NAN;
            const int64_t at = (int64_t)group * num_rows + index;
            const int32_t count = put(nearest(left * inverse), at, 0) + put(nearest(right * inverse), at, LANES);
            scales[at] = scale;
            excess[at] = 128 * count;
            sums[at] = scale * (float)count;
        }
    }

   private:
    static i32x16 nearest(f32x16 value) {
        const f32x16 shifted = value + splat(12582912.0f);
        return (i32x16)shifted - (i32x16)splat(12582912.0f);
    }

    // Sixteen numbers as 256 times a high byte and a low byte, both signed. Returns their sum.
    int32_t put(i32x16 number, int64_t at, int from) const {
        typedef int8_t i8x16 __attribute__((vector_size(16)));
        const i32x16 high = (number + 128) >> 8;
        store(numbers + at * NUMBER_BYTES + from, __builtin_convertvector(high, i8x16));
        store(numbers + at * NUMBER_BYTES + GROUP + from, __builtin_convertvector(number - (high << 8), i8x16));
        int32_t count = 0;
        for (int lane = 0; lane < LANES; lane++) count += number[lane];
        return count;
    }
};
