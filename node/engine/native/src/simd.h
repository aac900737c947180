// Sixteen lanes of float or int32 as one value, whatever the machine's registers: GCC and Clang lower the vector
// types to AVX-512, AVX2, NEON or plain code. Only what they cannot express well (half floats, the 8-bit dot
// product, one rounding for multiply and add) is written per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <typename V>
static inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <typename V>
static inline void store(void* to, V value) {
    std::memcpy(to, &value, sizeof value);
}

static inline f32x16 splat(float value) {
    return f32x16{value, value, value, value, value, value, value, value,
                  value, value, value, value, value, value, value, value};
}

static inline f32x16 to_float(i32x16 value) {
    return __builtin_convertvector(value, f32x16);
}

// a * b + c
static inline f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

static inline f32x16 max16(f32x16 a, f32x16 b) {
    return a > b ? a : b;
}

// The order is fixed, so that a sum is the same on every machine.
static inline float sum_of(f32x16 value) {
    float lanes[LANES];
    store(lanes, value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

static inline float max_of(f32x16 value) {
    float lanes[LANES];
    store(lanes, value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++)
            lanes[lane] = lanes[lane] > lanes[lane + width] ? lanes[lane] : lanes[lane + width];
    return lanes[0];
}

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x0400) {
        bits = sign | ((rest << 13) + 0x38000000);
    } else {
        float small = (float)rest * 0x1p-24f;
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// To nearest, ties to even; beyond the largest half it stays at the largest, so that no infinity is made.
static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477fe000) return sign | 0x7bff;
    if (rest < 0x38800000) {
        float magnitude;
        std::memcpy(&magnitude, &rest, 4);
        // Adding one half puts the bits of a subnormal where the float's lowest bits are.
        float shifted = magnitude + 0.5f;
        uint32_t shifted_bits;
        std::memcpy(&shifted_bits, &shifted, 4);
        return sign | (uint16_t)(shifted_bits - 0x3f000000);
    }
    const uint32_t odd = rest >> 13 & 1;
    return sign | (uint16_t)((rest - 0x38000000 + 0xfff + odd) >> 13);
}

static inline f32x16 load_half(const uint16_t* from) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
    f32x16 value;
    store((char*)&value, _mm256_cvtph_ps(load<__m128i>(from)));
    store((char*)&value + 32, _mm256_cvtph_ps(load<__m128i>(from + 8)));
    return value;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    f32x16 value;
    for (int part = 0; part < 4; part++) {
        float32x4_t four = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * part)));
        std::memcpy((char*)&value + 16 * part, &four, 16);
    }
    return value;
#else
    f32x16 value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = half_to_float(from[lane]);
    return value;
#endif
}

static inline f32x16 load_bfloat(const uint16_t* from) {
    typedef uint16_t u16x16 __attribute__((vector_size(32)));
    return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
}

static inline int32_t load_i32(const void* from) {
    int32_t value;
    std::memcpy(&value, from, 4);
    return value;
}

// sums[lane] += the four unsigned bytes of the lane times the four signed bytes of `four`. Exact.
static inline i32x16 dot4(i32x16 sums, u8x64 bytes, int32_t four) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    const __m256i signed_bytes = _mm256_set1_epi32(four);
    const __m256i low_half = _mm256_set1_epi16(0x00ff);
    i32x16 result = sums;
    for (int part = 0; part < 2; part++) {
        const __m256i raw = load<__m256i>((const char*)&bytes + 32 * part);
        __m256i sum = load<__m256i>((const char*)&sums + 32 * part);
#if defined(__AVXVNNI__)
        (void)low_half;
        sum = _mm256_dpbusd_avx_epi32(sum, raw, signed_bytes);
#else
        // Even and odd bytes apart as 16-bit numbers: the direct instruction would saturate.
        const __m256i even = _mm256_and_si256(raw, low_half), odd = _mm256_srli_epi16(raw, 8);
        const __m256i even_signed = _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8);
        const __m256i odd_signed = _mm256_srai_epi16(signed_bytes, 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, even_signed));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, odd_signed));
#endif
        store((char*)&result + 32 * part, sum);
    }
    return result;
#else
    int8_t factors[4];
    std::memcpy(factors, &four, 4);
    i32x16 result = sums;
    for (int lane = 0; lane < LANES; lane++)
        for (int byte = 0; byte < 4; byte++) result[lane] += (int32_t)bytes[4 * lane + byte] * factors[byte];
    return result;
#endif
}

// e to the power of x, for x <= 0; the polynomial of Cephes' expf (Moshier), good to 2 units in the last place.
static inline f32x16 exp16(f32x16 x) {
    x = max16(x, splat(-87.0f));
    const f32x16 scaled = x * splat(1.44269504088896341f);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const f32x16 rounded = (scaled + splat(12582912.0f)) - splat(12582912.0f);
    f32x16 rest = fma16(rounded, splat(-0.693359375f), x);
    rest = fma16(rounded, splat(2.12194440e-4f), rest);
    f32x16 value = splat(1.9875691500e-4f);
    value = fma16(value, rest, splat(1.3981999507e-3f));
    value = fma16(value, rest, splat(8.3334519073e-3f));
    value = fma16(value, rest, splat(4.1665795894e-2f));
    value = fma16(value, rest, splat(1.6666665459e-1f));
    value = fma16(value, rest, splat(5.0000001201e-1f));
    value = fma16(value, rest * rest, rest + splat(1.0f));
    const i32x16 exponent = __builtin_convertvector(rounded, i32x16) << 23;
    return (f32x16)((i32x16)value + exponent);
}
