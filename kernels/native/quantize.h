// The search for the scales of a quantised weight: what csm.quantize.quantize_blocks does, a block at a time, written
// straight into tiles.
#pragma once

#include "product.h"

namespace csm {

inline uint16_t half_from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = (bits >> 16) & 0x8000u;
    const float size = std::fabs(x);
    if (!(size < 65520.0f)) return sign | (size == size ? 0x7c00u : 0x7e00u);
    if (size < 0x1p-14f) return sign | uint16_t(std::lrint(size * 0x1p24f));  // the last of these is the first normal
    uint32_t magnitude = bits & 0x7fffffffu;
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return sign | uint16_t((magnitude >> 13) - (112u << 10));
}

constexpr int64_t PARTS = BLOCK / WIDTH;  // vectors of a block

struct Levels {
    float least, largest;
    const float* extremes;  // what a block's largest value may become
    int64_t count;
};

// The scale, as float16, and the values of one block.
inline uint16_t quantise_block(const float* w, const float* importance, const Levels& levels, float* best_q) {
    const Vector magic = Vector{} + 0x1.8p23f, least = Vector{} + levels.least, largest = Vector{} + levels.largest;
    float extreme = 0;
    for (int64_t i = 0; i < BLOCK; i++)
        if (std::fabs(w[i]) > std::fabs(extreme)) extreme = w[i];
    std::fill(best_q, best_q + BLOCK, 0.0f);
    if (extreme == 0) return 0;
    uint16_t best_scale = 0;
    float best_error = INFINITY;
    for (int64_t candidate = 0; candidate < levels.count; candidate++) {
        const float inverse = levels.extremes[candidate] / extreme;
        Vector q[PARTS], fit = {}, size = {}, errors = {};
        for (int64_t p = 0; p < PARTS; p++) {
            const Vector value = load_vector(w + p * WIDTH), weight = load_vector(importance + p * WIDTH);
            Vector scaled = value * inverse;
            scaled = scaled < least ? least : scaled > largest ? largest : scaled;
            volatile Vector shifted = scaled + magic;  // volatile: the compiler must not fold the two additions
            q[p] = shifted - magic;
            fit += weight * value * q[p];
            size += weight * q[p] * q[p];
        }
        const float total = sum_of(size);
        const uint16_t half = half_from_float(total > 0 ? sum_of(fit) / total : 1 / inverse);
        const float scale = float_from_half(half);
        for (int64_t p = 0; p < PARTS; p++) {
            const Vector error = load_vector(w + p * WIDTH) - scale * q[p];
            errors += load_vector(importance + p * WIDTH) * error * error;
        }
        const float error = sum_of(errors);
        if (error < best_error) {
            best_error = error, best_scale = half;
            std::memcpy(best_q, q, sizeof q);
        }
    }
    return best_scale;
}

// One tile of a weight (n, k), whose first output is `first`.
template <class T>
void quantise_tile(const T* w, int64_t n, int64_t k, int64_t first, const float* importance, const Levels& levels,
                   const Weight& packed, uint8_t* out) {
    const bool half = packed.kind == INT4;
    const int64_t value_bytes = LANES * BLOCK / (half ? 2 : 1);
    float values[BLOCK], weights[BLOCK], q[BLOCK];
    for (int64_t block = 0; block < 2 * packed.pairs(); block++) {
        uint8_t* pair = out + block / 2 * packed.pair_bytes();
        uint8_t* to = pair + SCALE_BYTES + block % 2 * value_bytes;
        for (int64_t lane = 0; lane < LANES; lane++) {
            for (int64_t i = 0; i < BLOCK; i++) {
                const int64_t at = block * BLOCK + i;
                const bool real = first + lane < n && at < k;
                values[i] = real ? to_float(w[(first + lane) * k + at]) : 0;
                weights[i] = real ? importance[at] : 0;
            }
            const uint16_t scale = quantise_block(values, weights, levels, q);
            std::memcpy(pair + (block % 2 * LANES + lane) * 2, &scale, 2);
            for (int64_t i = 0; i < BLOCK; i += 8)
                for (int64_t j = 0; j < 4; j++) {
                    const int lower = int(q[i + j]), upper = int(q[i + 4 + j]);
                    uint8_t* at = to + (half ? i / 8 : i / 4) * 64 + lane * 4 + j;
                    at[0] = half ? (lower + 8) | ((upper + 8) << 4) : lower + 128;
                    if (!half) at[64] = uint8_t(upper + 128);
                }
        }
    }
}

}  // namespace csm
