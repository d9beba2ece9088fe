// Drawing a code: temperature, top-k and Gumbel noise from a counter. See csm.kernels.sample, whose formulas these are.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace csm {

// Philox4x32-10 (Salmon et al., SC 2011): four words of the counter to four random words.
inline void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = uint64_t(c[0]) * 0xD2511F53u, product1 = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t high0 = uint32_t(product0 >> 32), high1 = uint32_t(product1 >> 32);
        const uint32_t next[4] = {high1 ^ c[1] ^ key0, uint32_t(product1), high0 ^ c[3] ^ key1, uint32_t(product0)};
        std::copy(next, next + 4, c);
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

inline float gumbel(uint64_t seed, uint32_t frame, uint32_t codebook, uint32_t id) {
    uint32_t words[4] = {id / 4, codebook, frame, 0};
    philox(words, uint32_t(seed), uint32_t(seed >> 32));
    const float uniform = (float(words[id % 4] >> 9) + 0.5f) * 0x1p-23f;
    return -std::log(-std::log(uniform));
}

// As a whole number in the order of the floats: what is not a number is the largest, or the least if its sign is set.
inline int32_t ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

struct Draw {
    int64_t seed, frame, codebook, top_k;
    float temperature;
};

// The id of one slot: of those whose logit is not below the k-th best, the one with the best key.
template <class T>
int64_t sample_id(const T* logits, int64_t size, const Draw& draw) {
    static thread_local std::vector<int32_t> order;
    order.resize(size);
    for (int64_t id = 0; id < size; id++) order[id] = ordered(to_float(logits[id]));
    const int64_t rank = size - std::min(std::max(draw.top_k, int64_t(1)), size);
    std::nth_element(order.begin(), order.begin() + rank, order.end());
    const int32_t least = order[rank];
    int64_t best = -1;
    float best_key = 0;
    for (int64_t id = 0; id < size; id++) {
        const float logit = to_float(logits[id]);
        if (ordered(logit) < least && !std::isnan(logit)) continue;
        float key = logit;
        if (draw.temperature != 0) {
            // Volatile: rounded before the sum, as in PyTorch. The compiler would use one instruction for both.
            volatile float noise = draw.temperature * gumbel(draw.seed, draw.frame, draw.codebook, id);
            key += noise;
        }
        if (std::isnan(key)) return id;  // as torch.argmax does
        if (best < 0 || key > best_key) best = id, best_key = key;
    }
    return best;
}

}  // namespace csm
