// Products of a few rows with a weight of any kind: float32 or bfloat16 row by row as PyTorch stores it, int8 or int4
// packed into tiles by csm.kernels.quantized.
//
// A tile holds 16 outputs. Along k it goes by pairs of blocks of 32: first the scales, 2 x 16 float16, then the values,
// 4 of each output in turn, so that a multiplication of 16 x 4 bytes meets 4 values of the input. An int8 is stored as
// value + 128, an int4 as value + 8; of two int4 in a byte, the lower 4 bits come first by k.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace csm {

constexpr int64_t BLOCK = 32;                             // values that share a scale
constexpr int64_t PAIR = 2 * BLOCK;                       // k of a packed weight is filled up to a multiple
constexpr int64_t SCALE_BYTES = 2 * LANES * 2;            // of a pair of blocks
constexpr int64_t ROWS_AT_ONCE = 4;                       // rows of the input that a loaded weight is multiplied with

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Weight {
    Kind kind;
    const void* data;
    int64_t n, k;

    bool packed() const { return kind >= INT8; }
    int64_t pairs() const { return (k + PAIR - 1) / PAIR; }
    int64_t pair_bytes() const { return SCALE_BYTES + LANES * PAIR / (kind == INT4 ? 2 : 1); }
};

// The rows of an input: as floats, filled up with zeros to a multiple of PAIR; and quantised, block by block, where the
// weight is packed.
struct Input {
    int64_t rows = 0, k = 0, filled = 0;
    std::vector<float> values;
    std::vector<int8_t> bytes;
    std::vector<float> scales;
    std::vector<int32_t> sums;  // of the bytes of a block

    void reset(int64_t new_rows, int64_t new_k) {
        rows = new_rows, k = new_k, filled = (k + PAIR - 1) / PAIR * PAIR;
        values.resize(rows * filled), bytes.resize(rows * filled);
        scales.resize(rows * filled / BLOCK), sums.resize(rows * filled / BLOCK);
    }
    float* row(int64_t m) { return values.data() + m * filled; }
    const float* row(int64_t m) const { return values.data() + m * filled; }

    void quantise(int64_t m) {
        typedef int32_t Signed __attribute__((vector_size(4 * WIDTH)));
        typedef int8_t Small __attribute__((vector_size(WIDTH)));
        const Vector magic = Vector{} + 0x1.8p23f;  // adding it rounds to a whole number, in the lowest bits
        for (int64_t block = 0; block < filled / BLOCK; block++) {
            const float* x = row(m) + block * BLOCK;
            int8_t* q = bytes.data() + m * filled + block * BLOCK;
            Vector most = {};
            for (int64_t i = 0; i < BLOCK; i += WIDTH) {
                Vector v = load_vector(x + i), size = v < 0 ? -v : v;
                most = size > most ? size : most;
            }
            float amax = 0;
            for (int i = 0; i < WIDTH; i++) amax = std::max(amax, most[i]);
            float inverse = amax > 0x1p-100f ? 127 / amax : 0;
            Signed sum = {};
            for (int64_t i = 0; i < BLOCK; i += WIDTH) {
                Vector shifted = load_vector(x + i) * inverse + magic;
                Signed whole;
                std::memcpy(&whole, &shifted, sizeof whole);
                whole -= 0x4b400000;
                sum += whole;
                Small small = __builtin_convertvector(whole, Small);
                std::memcpy(q + i, &small, sizeof small);
            }
            int32_t total = 0;
            for (int i = 0; i < WIDTH; i++) total += sum[i];
            scales[m * filled / BLOCK + block] = amax / 127;
            sums[m * filled / BLOCK + block] = total;
        }
    }
};

// One block of a tile times M rows, whose blocks are at `x`, `stride` bytes apart.
template <bool HALF, int M>
inline void block_product(const uint8_t* at, const int8_t* x, int64_t stride, Ints (&even)[M], Ints (&odd)[M]) {
    for (int v = 0; v < 4; v++) {
        Bytes lower, upper;
        if (HALF) {
            Bytes both = load_bytes(at + 64 * v);
            lower = low_nibbles(both), upper = high_nibbles(both);
        } else {
            lower = load_bytes(at + 128 * v), upper = load_bytes(at + 128 * v + 64);
        }
        for (int i = 0; i < M; i++) {
            const int8_t* eight = x + i * stride + 8 * v;
            even[i] = HALF ? dot_nibbles(even[i], lower, eight) : dot_bytes(even[i], lower, eight);
            odd[i] = HALF ? dot_nibbles(odd[i], upper, eight + 4) : dot_bytes(odd[i], upper, eight + 4);
        }
    }
}

// One tile times M rows, from row `m` on: out[row * stride + lane].
template <bool HALF, int M>
inline void tile_product(const uint8_t* tile, const Weight& w, const Input& x, int64_t m, float* out, int64_t stride) {
    constexpr int64_t VALUE_BYTES = LANES * BLOCK / (HALF ? 2 : 1), BYTES = SCALE_BYTES + 2 * VALUE_BYTES;
    const int64_t pairs = w.pairs(), blocks = 2 * pairs;
    const int8_t* bytes = x.bytes.data() + m * x.filled;
    const float* scales = x.scales.data() + m * blocks;
    const int32_t* sums = x.sums.data() + m * blocks;
    Floats acc[M];
    for (int i = 0; i < M; i++) acc[i] = zeros();
    for (int64_t pair = 0; pair < pairs; pair++, tile += BYTES) {
        for (int half = 0; half < 2; half++) {
            const int64_t block = 2 * pair + half;
            Ints even[M], odd[M];
            for (int i = 0; i < M; i++) {
                even[i] = broadcast(-(HALF ? 8 : BYTE_ZERO) * sums[i * blocks + block]);
                odd[i] = broadcast(0);
            }
            const uint8_t* values = tile + SCALE_BYTES + half * VALUE_BYTES;
            block_product<HALF, M>(values, bytes + block * BLOCK, x.filled, even, odd);
            Floats scale = halves(tile + half * SCALE_BYTES / 2);
            for (int i = 0; i < M; i++)
                acc[i] = scale_add(acc[i], add(even[i], odd[i]), scale, scales[i * blocks + block]);
        }
    }
    for (int i = 0; i < M; i++) store(out + i * stride, acc[i]);
}

// N rows of a weight times M rows of the input.
template <class T, int N, int M>
inline void dense_product(const T* w, int64_t k, const float* x, int64_t filled, float* out, int64_t stride) {
    Vector acc[N][M] = {};
    int64_t i = 0;
    for (; i + WIDTH <= k; i += WIDTH) {
        Vector at[M];
        for (int m = 0; m < M; m++) at[m] = load_vector(x + m * filled + i);
        for (int n = 0; n < N; n++) {
            __builtin_prefetch(w + (N + n) * k + i);
            Vector value = load_vector(w + n * k + i);
            for (int m = 0; m < M; m++) acc[n][m] += value * at[m];
        }
    }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) {
            float sum = sum_of(acc[n][m]);
            for (int64_t rest = i; rest < k; rest++) sum += to_float(w[n * k + rest]) * x[m * filled + rest];
            out[m * stride + n] = sum;
        }
}

// N rows of a weight times all rows of the input. The weight's are read from memory once, and then from the cache.
template <class T, int N>
void dense_group(const T* w, const Input& x, float* out, int64_t stride) {
    for (int64_t m = 0; m < x.rows;) {
        const int64_t left = x.rows - m, many = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        float* to = out + m * stride;
        if (many == 4)
            dense_product<T, N, 4>(w, x.k, x.row(m), x.filled, to, stride);
        else if (many == 2)
            dense_product<T, N, 2>(w, x.k, x.row(m), x.filled, to, stride);
        else
            dense_product<T, N, 1>(w, x.k, x.row(m), x.filled, to, stride);
        m += many;
    }
}

template <class T>
void dense_rows(const Weight& w, const Input& x, int64_t first, int64_t last, float* out, int64_t stride) {
    const T* data = static_cast<const T*>(w.data);
    int64_t n = first;
    for (; n + 4 <= last; n += 4) dense_group<T, 4>(data + n * w.k, x, out + n, stride);
    for (; n < last; n++) dense_group<T, 1>(data + n * w.k, x, out + n, stride);
}

template <bool HALF>
void packed_rows(const Weight& w, const Input& x, int64_t first, int64_t last, float* out, int64_t stride) {
    const uint8_t* data = static_cast<const uint8_t*>(w.data);
    const int64_t tile_bytes = w.pairs() * w.pair_bytes();
    float spare[ROWS_AT_ONCE * LANES];
    for (int64_t tile = first / LANES; tile * LANES < last; tile++) {
        const uint8_t* at = data + tile * tile_bytes;
        const int64_t from = std::max(first, tile * LANES), to = std::min(last, (tile + 1) * LANES);
        const bool whole = to - from == LANES;
        for (int64_t m = 0; m < x.rows;) {
            const int64_t many = x.rows - m >= 4 ? 4 : 1;
            float* into = whole ? out + m * stride + tile * LANES : spare;
            const int64_t into_stride = whole ? stride : LANES;
            if (many == 4)
                tile_product<HALF, 4>(at, w, x, m, into, into_stride);
            else
                tile_product<HALF, 1>(at, w, x, m, into, into_stride);
            for (int64_t i = 0; !whole && i < many; i++)
                std::copy(spare + i * LANES + from % LANES, spare + i * LANES + from % LANES + to - from,
                          out + (m + i) * stride + from);
            m += many;
        }
    }
}

// out[m * stride + n] for the outputs n from `first` to `last`, which is left out.
inline void product(const Weight& w, const Input& x, int64_t first, int64_t last, float* out, int64_t stride) {
    if (first >= last) return;
    switch (w.kind) {
        case FLOAT32: return dense_rows<float>(w, x, first, last, out, stride);
        case BFLOAT16: return dense_rows<bf16>(w, x, first, last, out, stride);
        case INT8: return packed_rows<false>(w, x, first, last, out, stride);
        case INT4: return packed_rows<true>(w, x, first, last, out, stride);
    }
}

}  // namespace csm
