// The few vector operations that the products need, for AVX-512 with VNNI, AVX2, NEON with dot products, and as plain
// loops, which any compiler takes and which the others are tested against (-DCSM_PLAIN).
//
// A `Bytes` is 64 bytes of a packed weight: of each of 16 outputs (lanes), 4 values along k. A `Ints` or `Floats` is one
// number for each of the 16 outputs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(CSM_PLAIN)
#define CSM_ISA "plain"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define CSM_ISA "avx512_vnni"
#define CSM_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define CSM_ISA "avx2"
#define CSM_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define CSM_ISA "neon_dotprod"
#define CSM_NEON 1
#include <arm_neon.h>
#else
#define CSM_ISA "plain"
#endif

namespace csm {

constexpr int LANES = 16;  // outputs of a tile

inline float float_from_half(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
    if (exponent == 0) {
        float small = float(mantissa) * 0x1p-24f;
        return sign ? -small : small;
    }
    uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

#if defined(CSM_AVX512)

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int BYTE_ZERO = 128;  // what dot_bytes takes for 0: VNNI multiplies unsigned by signed

inline Bytes load_bytes(const uint8_t* at) { return _mm512_loadu_si512(at); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline Ints broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add(Ints x, Ints y) { return _mm512_add_epi32(x, y); }
inline Ints dot_nibbles(Ints sum, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
}
inline Ints dot_bytes(Ints sum, Bytes w, const int8_t* x) { return dot_nibbles(sum, w, x); }
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats halves(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline Floats scale_add(Floats sum, Ints x, Floats weight_scale, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_mul_ps(weight_scale, _mm512_set1_ps(scale)), sum);
}
inline void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }

#elif defined(CSM_AVX2)

struct Bytes { __m256i v[2]; };
struct Ints { __m256i v[2]; };
struct Floats { __m256 v[2]; };
constexpr int BYTE_ZERO = 0;

inline Bytes load_bytes(const uint8_t* at) {
    const __m256i* p = reinterpret_cast<const __m256i*>(at);
    return {{_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)}};
}
inline Bytes low_nibbles(Bytes x) {
    __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(x.v[0], mask), _mm256_and_si256(x.v[1], mask)}};
}
inline Bytes high_nibbles(Bytes x) {
    return low_nibbles({{_mm256_srli_epi16(x.v[0], 4), _mm256_srli_epi16(x.v[1], 4)}});
}
inline Ints broadcast(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
inline Ints add(Ints x, Ints y) { return {{_mm256_add_epi32(x.v[0], y.v[0]), _mm256_add_epi32(x.v[1], y.v[1])}}; }
inline __m256i dot_unsigned(__m256i sum, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    __m256i pairs = _mm256_maddubs_epi16(w, x);  // at most 2 * 128 * 127: no saturation
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
inline __m256i four_of(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
inline Ints dot_nibbles(Ints sum, Bytes w, const int8_t* x) {
    __m256i four = four_of(x);
    return {{dot_unsigned(sum.v[0], w.v[0], four), dot_unsigned(sum.v[1], w.v[1], four)}};
}
inline Ints dot_bytes(Ints sum, Bytes w, const int8_t* x) {
    __m256i four = four_of(x), flip = _mm256_set1_epi8(-128);
    for (int i = 0; i < 2; i++) {
        __m256i value = _mm256_xor_si256(w.v[i], flip);  // signed: |w| times x with the sign of w
        sum.v[i] = dot_unsigned(sum.v[i], _mm256_abs_epi8(value), _mm256_sign_epi8(four, value));
    }
    return sum;
}
inline Floats zeros() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline Floats halves(const uint8_t* at) {
    const __m128i* p = reinterpret_cast<const __m128i*>(at);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1))}};
}
inline Floats scale_add(Floats sum, Ints x, Floats weight_scale, float scale) {
    __m256 factor = _mm256_set1_ps(scale);
    for (int i = 0; i < 2; i++)
        sum.v[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(x.v[i]), _mm256_mul_ps(weight_scale.v[i], factor), sum.v[i]);
    return sum;
}
inline void store(float* at, Floats x) {
    _mm256_storeu_ps(at, x.v[0]);
    _mm256_storeu_ps(at + 8, x.v[1]);
}

#elif defined(CSM_NEON)

struct Bytes { uint8x16_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Floats { float32x4_t v[4]; };
constexpr int BYTE_ZERO = 0;

inline Bytes load_bytes(const uint8_t* at) {
    return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
}
inline Bytes low_nibbles(Bytes x) {
    for (auto& v : x.v) v = vandq_u8(v, vdupq_n_u8(15));
    return x;
}
inline Bytes high_nibbles(Bytes x) {
    for (auto& v : x.v) v = vshrq_n_u8(v, 4);
    return x;
}
inline Ints broadcast(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
inline Ints add(Ints x, Ints y) {
    for (int i = 0; i < 4; i++) x.v[i] = vaddq_s32(x.v[i], y.v[i]);
    return x;
}
inline int8x16_t four_of(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
inline Ints dot_nibbles(Ints sum, Bytes w, const int8_t* x) {
    int8x16_t four = four_of(x);
    for (int i = 0; i < 4; i++) sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), four);
    return sum;
}
inline Ints dot_bytes(Ints sum, Bytes w, const int8_t* x) {
    for (auto& v : w.v) v = veorq_u8(v, vdupq_n_u8(128));
    return dot_nibbles(sum, w, x);
}
inline Floats zeros() { return {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}; }
inline Floats halves(const uint8_t* at) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(at);
    Floats x;
    for (int i = 0; i < 4; i++) x.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return x;
}
inline Floats scale_add(Floats sum, Ints x, Floats weight_scale, float scale) {
    for (int i = 0; i < 4; i++)
        sum.v[i] = vfmaq_f32(sum.v[i], vcvtq_f32_s32(x.v[i]), vmulq_n_f32(weight_scale.v[i], scale));
    return sum;
}
inline void store(float* at, Floats x) {
    for (int i = 0; i < 4; i++) vst1q_f32(at + 4 * i, x.v[i]);
}

#else

struct Bytes { uint8_t v[4 * LANES]; };
struct Ints { int32_t v[LANES]; };
struct Floats { float v[LANES]; };
constexpr int BYTE_ZERO = 0;

inline Bytes load_bytes(const uint8_t* at) {
    Bytes x;
    std::memcpy(x.v, at, sizeof x.v);
    return x;
}
inline Bytes low_nibbles(Bytes x) {
    for (auto& v : x.v) v &= 15;
    return x;
}
inline Bytes high_nibbles(Bytes x) {
    for (auto& v : x.v) v >>= 4;
    return x;
}
inline Ints broadcast(int32_t x) {
    Ints y;
    for (auto& v : y.v) v = x;
    return y;
}
inline Ints add(Ints x, Ints y) {
    for (int i = 0; i < LANES; i++) x.v[i] += y.v[i];
    return x;
}
inline Ints dot_nibbles(Ints sum, Bytes w, const int8_t* x) {
    for (int i = 0; i < 4 * LANES; i++) sum.v[i / 4] += w.v[i] * x[i % 4];
    return sum;
}
inline Ints dot_bytes(Ints sum, Bytes w, const int8_t* x) {
    for (int i = 0; i < 4 * LANES; i++) sum.v[i / 4] += (w.v[i] - 128) * x[i % 4];
    return sum;
}
inline Floats zeros() { return Floats{}; }
inline Floats halves(const uint8_t* at) {
    Floats x;
    for (int i = 0; i < LANES; i++) {
        uint16_t half;
        std::memcpy(&half, at + 2 * i, 2);
        x.v[i] = float_from_half(half);
    }
    return x;
}
inline Floats scale_add(Floats sum, Ints x, Floats weight_scale, float scale) {
    for (int i = 0; i < LANES; i++) sum.v[i] = std::fma(float(x.v[i]), weight_scale.v[i] * scale, sum.v[i]);
    return sum;
}
inline void store(float* at, Floats x) { std::memcpy(at, x.v, sizeof x.v); }

#endif

// Vectors of floats as wide as the machine's, by GCC's and Clang's vector extension: they compile for any target.
#if defined(CSM_AVX512)
constexpr int WIDTH = 16;
#elif defined(CSM_AVX2)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * WIDTH)));

using bf16 = uint16_t;  // as PyTorch stores it: the upper half of a float

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rounded to the nearest, ties to even. What is not a number stays so.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void put(float& at, float x) { at = x; }
inline void put(bf16& at, float x) { at = to_bf16(x); }

template <class T>
inline float rounded(float x) {
    T stored;
    put(stored, x);
    return to_float(stored);
}

inline Vector load_vector(const float* at) {
    Vector x;
    std::memcpy(&x, at, sizeof x);
    return x;
}
inline Vector load_vector(const bf16* at) {
    HalfWords half;
    std::memcpy(&half, at, sizeof half);
    Words words = __builtin_convertvector(half, Words) << 16;
    Vector x;
    std::memcpy(&x, &words, sizeof x);
    return x;
}
// By halves, which takes a quarter of the time of one number after the other.
inline float sum_of(Vector x) {
#if defined(CSM_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float parts[WIDTH];
    std::memcpy(parts, &x, sizeof x);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
#endif
}

}  // namespace csm
