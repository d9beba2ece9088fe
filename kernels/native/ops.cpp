// The ops of csm.kernels for few rows on a CPU, with a C interface. See docs/cpu.md.
//
// x, out, residual, q and the caches are all float32 or all bfloat16 (`dtype`, a Kind); what is between them is float32,
// rounded where the references in PyTorch round. An output is computed by one thread from beginning to end, in an order
// that does not depend on the number of threads.
#include <atomic>
#include <cerrno>
#include <cmath>

#include "pool.h"
#include "product.h"
#include "quantize.h"
#include "sample.h"

namespace csm {
namespace {

constexpr int64_t SERIAL_ROWS = 4;             // up to here a row is prepared sooner than a thread is woken
constexpr int64_t LEAST_TILES = 4, PIECES = 8;  // of a thread's part: what another may take over while it is held up
constexpr int64_t SERIAL_ATTENTION = 1 << 15;  // multiplications

template <class F>
void parallel(int64_t threads, int64_t n, const F& f) {
    if (threads > 1 && n > 1)
        Pool::instance().run(threads, n, 1, f);
    else if (n > 0)
        apply(f, 0, n);
}

// Whether `size` bytes of an open file, from byte `offset` on, could be read.
bool read_file(int64_t file, void* to, int64_t size, int64_t offset) {
#if defined(__unix__) || defined(__APPLE__)
    while (size > 0) {
        const int64_t count = pread(int(file), to, size, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        to = static_cast<char*>(to) + count, offset += count, size -= count;
    }
    return true;
#else
    return false;
#endif
}

// Buffers of the calling thread: they grow to the largest call and stay.
Input& input_buffer() {
    static thread_local Input buffer;
    return buffer;
}
std::vector<float>& output_buffer(int64_t size) {
    static thread_local std::vector<float> buffer;
    buffer.resize(std::max(int64_t(buffer.size()), size));
    return buffer;
}

// RMSNorm, rounded where PyTorch rounds: after the norm and after the weight.
template <class T>
void norm_row(const T* x, const T* norm, float eps, int64_t k, float* out) {
    Vector squares = {};
    int64_t i = 0;
    for (; i + WIDTH <= k; i += WIDTH) {
        Vector v = load_vector(x + i);
        squares += v * v;
    }
    float sum = sum_of(squares);
    for (; i < k; i++) sum += to_float(x[i]) * to_float(x[i]);
    const float scale = 1 / std::sqrt(sum / k + eps);
    for (int64_t j = 0; j < k; j++) out[j] = rounded<T>(rounded<T>(to_float(x[j]) * scale) * to_float(norm[j]));
}

// What a weight is multiplied with: the rows of x, normed where there is a norm.
template <class T>
const Input& prepare(const T* x, int64_t x_stride, int64_t rows, const T* norm, float eps, const Weight& w,
                     int64_t threads) {
    Input& input = input_buffer();
    input.reset(rows, w.k);
    parallel(rows > SERIAL_ROWS ? threads : 1, rows, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; m++) {
            float* row = input.row(m);
            if (norm)
                norm_row(x + m * x_stride, norm, eps, w.k, row);
            else
                for (int64_t i = 0; i < w.k; i++) row[i] = to_float(x[m * x_stride + i]);
            std::fill(row + w.k, row + input.filled, 0.0f);
            if (w.packed()) input.quantise(m);
        }
    });
    return input;
}

// f(first, last) over the outputs, cut where tiles begin.
template <class F>
void parallel_outputs(int64_t threads, int64_t n, const F& f) {
    const int64_t tiles = (n + LANES - 1) / LANES, piece = std::max(LEAST_TILES, tiles / (threads * PIECES));
    const auto outputs = [&](int64_t first, int64_t last) { f(first * LANES, std::min(last * LANES, n)); };
    if (threads > 1)
        Pool::instance().run(threads, tiles, piece, outputs);
    else
        outputs(0, tiles);
}

template <class T>
void norm_linear(const T* x, int64_t x_stride, int64_t rows, const T* norm, float eps, const Weight& w, T* out,
                 int64_t threads) {
    const Input& input = prepare(x, x_stride, rows, norm, eps, w, threads);
    float* sums = output_buffer(rows * w.n).data();
    parallel_outputs(threads, w.n, [&](int64_t first, int64_t last) {
        product(w, input, first, last, sums, w.n);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = first; n < last; n++) put(out[m * w.n + n], sums[m * w.n + n]);
    });
}

template <class T>
void norm_swiglu(const T* x, int64_t x_stride, int64_t rows, const T* norm, float eps, const Weight& w, T* out,
                 int64_t threads) {
    const Input& input = prepare(x, x_stride, rows, norm, eps, w, threads);
    const int64_t hidden = w.n / 2;
    float* sums = output_buffer(rows * w.n).data();
    parallel_outputs(threads, hidden, [&](int64_t first, int64_t last) {
        product(w, input, first, last, sums, w.n);
        product(w, input, hidden + first, hidden + last, sums, w.n);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = first; n < last; n++) {
                float gate = sums[m * w.n + n], up = sums[m * w.n + hidden + n];
                put(out[m * hidden + n], gate / (1 + std::exp(-gate)) * up);
            }
    });
}

template <class T>
void linear_add(const T* x, int64_t x_stride, int64_t rows, const Weight& w, const T* residual,
                int64_t residual_stride, T* out, int64_t threads) {
    const Input& input = prepare<T>(x, x_stride, rows, nullptr, 0, w, threads);
    float* sums = output_buffer(rows * w.n).data();
    parallel_outputs(threads, w.n, [&](int64_t first, int64_t last) {
        product(w, input, first, last, sums, w.n);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = first; n < last; n++)
                put(out[m * w.n + n], to_float(residual[m * residual_stride + n]) + sums[m * w.n + n]);
    });
}

// What a draw needs besides the logits, for each slot.
struct Draws {
    const int64_t *seeds, *frames;
    const float* temperatures;
    const int64_t* top_k;

    Draw at(int64_t slot, int64_t codebook) const {
        return {seeds[slot], frames[slot], codebook, top_k[slot], temperatures[slot]};
    }
};

// A code of each slot into codes[slot * codes_stride + codebook].
template <class T>
void sample(const T* logits, int64_t stride, int64_t slots, int64_t size, const Draws& draws, int64_t codebook,
            int64_t* codes, int64_t codes_stride) {
    for (int64_t slot = 0; slot < slots; slot++)
        codes[slot * codes_stride + codebook] = sample_id(logits + slot * stride, size, draws.at(slot, codebook));
}

// A table of embeddings: `count` rows of `dim` numbers in memory, or in an open file from byte `offset` on.
template <class T>
struct Table {
    const T* rows;
    int64_t file, offset, count, dim;

    // A row, read into `buffer` where it is in a file; null where there is none or it cannot be read.
    const T* row(int64_t index, T* buffer) const {
        if (index < 0 || index >= count) return nullptr;
        if (rows) return rows + index * dim;
        const int64_t size = dim * sizeof(T);
        return read_file(file, buffer, size, offset + index * size) ? buffer : nullptr;
    }
};

// The sum of the embeddings of one row's columns that the mask selects: codes, and the text id in the last one. Whether
// all could be read.
template <class T>
bool embed_row(const int64_t* ids, const bool* mask, const int64_t* offsets, int64_t num_codebooks,
               const Table<T>& audio, const Table<T>& text, T* out) {
    static thread_local std::vector<T> buffer;
    static thread_local std::vector<float> sum;
    const int64_t dim = audio.dim;
    buffer.resize(dim), sum.assign(dim, 0);
    for (int64_t column = 0; column <= num_codebooks; column++) {
        if (!mask[column]) continue;
        const bool is_text = column == num_codebooks;
        const T* own = is_text ? text.row(ids[column], buffer.data())
                               : audio.row(offsets[column] + ids[column], buffer.data());
        if (!own) return false;
        for (int64_t i = 0; i < dim; i++) sum[i] += to_float(own[i]);
    }
    for (int64_t i = 0; i < dim; i++) put(out[i], sum[i]);
    return true;
}

template <class T>
bool embed_rows(const int64_t* ids, const bool* mask, int64_t rows, const int64_t* offsets, int64_t num_codebooks,
                const Table<T>& audio, const Table<T>& text, T* out, int64_t threads) {
    std::atomic<bool> complete{true};
    parallel(rows > SERIAL_ROWS ? threads : 1, rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const int64_t at = row * (num_codebooks + 1);
            if (!embed_row(ids + at, mask + at, offsets, num_codebooks, audio, text, out + row * audio.dim))
                complete = false;
        }
    });
    return complete;
}

// Where a row's keys and values are: its slot and position, and the strides of the caches (B, G, S, d).
struct Cache {
    const int64_t* slots;  // of each slot that steps, or null: they are 0, 1, 2...
    const int64_t* positions;
    int64_t position_stride, rows_per_slot, slot_stride, head_stride, num_heads, head_dim;

    int64_t at(int64_t row) const { return row / rows_per_slot * position_stride + row % rows_per_slot; }
    int64_t position(int64_t row) const { return positions[at(row)]; }
    int64_t slot(int64_t row) const { return slots ? slots[row / rows_per_slot] : row / rows_per_slot; }
};

// The heads of q, k and v of one row: q and k turned by pairs, k and v written into the caches.
template <class T>
void rope_cache_row(const float* qkv, int64_t row, const Cache& cache, const float* rope, T* q, T* keys, T* values,
                    int64_t n) {
    const int64_t d = cache.head_dim, kv = cache.num_heads, heads = n / d;
    const float* turn = rope + cache.at(row) * d;
    const int64_t place = cache.slot(row) * cache.slot_stride + cache.position(row) * d;
    for (int64_t head = 0; head < heads; head++) {
        const bool is_value = head >= heads - kv, is_key = !is_value && head >= heads - 2 * kv;
        T* to = is_value ? values + place + (head - heads + kv) * cache.head_stride
                : is_key ? keys + place + (head - heads + 2 * kv) * cache.head_stride
                         : q + row * (heads - 2 * kv) * d + head * d;
        const float* from = qkv + head * d;
        for (int64_t i = 0; i < d; i += 2) {
            float even = rounded<T>(from[i]), odd = rounded<T>(from[i + 1]);
            float cos = is_value ? 1 : turn[i], sin = is_value ? 0 : turn[i + 1];
            put(to[i], even * cos - odd * sin);
            put(to[i + 1], even * sin + odd * cos);
        }
    }
}

template <class T>
void norm_rope_cache(const T* x, int64_t x_stride, int64_t rows, const T* norm, float eps, const Weight& w,
                     const Cache& cache, const float* rope, T* q, T* keys, T* values, int64_t threads) {
    const Input& input = prepare(x, x_stride, rows, norm, eps, w, threads);
    float* sums = output_buffer(rows * w.n).data();
    parallel_outputs(threads, w.n,
                     [&](int64_t first, int64_t last) { product(w, input, first, last, sums, w.n); });
    parallel(rows > SERIAL_ROWS ? threads : 1, rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            rope_cache_row(sums + row * w.n, row, cache, rope, q, keys, values, w.n);
    });
}

template <class T>
float dot(const float* x, const T* y, int64_t n) {
    Vector sums = {};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) sums += load_vector(x + i) * load_vector(y + i);
    float sum = sum_of(sums);
    for (; i < n; i++) sum += x[i] * to_float(y[i]);
    return sum;
}

// The query heads of one row that share key head `group`: out[head * d + i], rounded.
template <class T>
void attend(const T* q, const T* keys, const T* values, const Cache& cache, int64_t num_queries, int64_t row,
            int64_t group, float* out) {
    const int64_t d = cache.head_dim, together = num_queries / cache.num_heads, length = cache.position(row) + 1;
    const T* k = keys + cache.slot(row) * cache.slot_stride + group * cache.head_stride;
    const T* v = values + cache.slot(row) * cache.slot_stride + group * cache.head_stride;
    static thread_local std::vector<float> query, score, mixed;
    query.resize(d), score.resize(length), mixed.resize(d);
    for (int64_t head = group * together; head < (group + 1) * together; head++) {
        const T* own = q + (row * num_queries + head) * d;
        for (int64_t i = 0; i < d; i++) query[i] = to_float(own[i]) / std::sqrt(float(d));
        float best = -INFINITY, sum = 0;
        for (int64_t s = 0; s < length; s++) best = std::max(best, score[s] = dot(query.data(), k + s * d, d));
        std::fill(mixed.begin(), mixed.end(), 0.0f);
        for (int64_t s = 0; s < length; s++) {
            const float weight = std::exp(score[s] - best);
            sum += weight;
            for (int64_t i = 0; i < d; i++) mixed[i] += weight * to_float(v[s * d + i]);
        }
        for (int64_t i = 0; i < d; i++) out[head * d + i] = rounded<T>(mixed[i] / sum);
    }
}

template <class T>
void attention_linear_add(const T* q, int64_t rows, int64_t num_queries, const T* keys, const T* values,
                          const Cache& cache, const Weight& w, const T* residual, int64_t residual_stride, T* out,
                          int64_t threads) {
    Input& input = input_buffer();
    input.reset(rows, w.k);
    int64_t work = 0;
    for (int64_t row = 0; row < rows; row++) work += 2 * (cache.position(row) + 1) * num_queries * cache.head_dim;
    parallel(work > SERIAL_ATTENTION ? threads : 1, rows * cache.num_heads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / cache.num_heads;
            attend(q, keys, values, cache, num_queries, row, i % cache.num_heads, input.row(row));
        }
    });
    for (int64_t m = 0; m < rows; m++) {
        std::fill(input.row(m) + w.k, input.row(m) + input.filled, 0.0f);
        if (w.packed()) input.quantise(m);
    }
    float* sums = output_buffer(rows * w.n).data();
    parallel_outputs(threads, w.n, [&](int64_t first, int64_t last) {
        product(w, input, first, last, sums, w.n);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = first; n < last; n++)
                put(out[m * w.n + n], to_float(residual[m * residual_stride + n]) + sums[m * w.n + n]);
    });
}

// The weights of a block, and of the RMSNorms before its two halves.
struct Block {
    const void *attention_norm, *mlp_norm;
    float eps;
    Weight qkv, output, gate_up, down;
};

// A block is its four ops, one after the other.
template <class T>
void block(const T* x, int64_t x_stride, int64_t rows, const Block& w, const Cache& cache, const float* rope, T* keys,
           T* values, T* out, int64_t threads) {
    static thread_local std::vector<T> q, h, hidden;
    const int64_t num_queries = w.output.k / cache.head_dim, dim = w.output.n;
    q.resize(rows * w.output.k), h.resize(rows * dim), hidden.resize(rows * w.down.k);
    Cache read = cache;
    read.slots = nullptr;
    norm_rope_cache(x, x_stride, rows, static_cast<const T*>(w.attention_norm), w.eps, w.qkv, cache, rope, q.data(),
                    keys, values, threads);
    attention_linear_add<T>(q.data(), rows, num_queries, keys, values, read, w.output, x, x_stride, h.data(), threads);
    norm_swiglu<T>(h.data(), dim, rows, static_cast<const T*>(w.mlp_norm), w.eps, w.gate_up, hidden.data(), threads);
    linear_add<T>(hidden.data(), w.down.k, rows, w.down, h.data(), dim, out, threads);
}

// A weight, from Python: kind, address, outputs and inputs. A block's weights: two norms, then four weights.
constexpr int64_t WEIGHT_VALUES = 4, BLOCK_VALUES = 2 + 4 * WEIGHT_VALUES;

Weight read_weight(const int64_t* values) {
    return {Kind(values[0]), reinterpret_cast<const void*>(values[1]), values[2], values[3]};
}

Block read_block(const int64_t* values, float eps) {
    Weight weights[4];
    for (int i = 0; i < 4; i++) weights[i] = read_weight(values + 2 + WEIGHT_VALUES * i);
    const auto norm = [&](int i) { return reinterpret_cast<const void*>(values[i]); };
    return {norm(0), norm(1), eps, weights[0], weights[1], weights[2], weights[3]};
}

// The blocks of a transformer; each has its own part of the caches.
template <class T>
struct Layers {
    int64_t count;
    const int64_t* weights;
    float eps;
    T *keys, *values;
    int64_t stride;  // of a layer's part of the caches
};

template <class T>
void blocks(const T* x, int64_t x_stride, int64_t rows, const Layers<T>& layers, const Cache& cache, const float* rope,
            T* out, int64_t threads) {
    static thread_local std::vector<T> states;
    const int64_t dim = read_block(layers.weights, layers.eps).output.n;
    states.resize(2 * rows * dim);
    for (int64_t i = 0; i < layers.count; i++) {
        const Block w = read_block(layers.weights + i * BLOCK_VALUES, layers.eps);
        T* to = i + 1 == layers.count ? out : states.data() + i % 2 * rows * dim;
        block(x, x_stride, rows, w, cache, rope, layers.keys + i * layers.stride, layers.values + i * layers.stride, to,
              threads);
        x = to, x_stride = dim;
    }
}

// The passes of the depth decoder for one frame: codes 1 to the last one of each slot. The first pass has two rows of
// each slot, x, at the first two positions; a later one has the embedding of the code before. Returns the row of
// the table that could not be read, or 0.
template <class T>
int64_t depth_codes(const T* x, int64_t slots, int64_t num_codebooks, const Layers<T>& layers, const Cache& cache,
                    const float* rope, const T* norm, const int64_t* heads, const Table<T>& table, int64_t table_step,
                    const Draws& draws, int64_t* codes, int64_t codes_stride, int64_t threads) {
    static thread_local std::vector<T> hidden, logits, embedded;
    const int64_t dim = table.dim;
    hidden.resize(2 * slots * dim), embedded.resize(slots * dim);
    for (int64_t codebook = 1; codebook < num_codebooks; codebook++) {
        const int64_t rows = codebook == 1 ? 2 : 1, first = codebook + 1 - rows;
        Cache at = cache;
        at.positions += first, at.rows_per_slot = rows;
        blocks<T>(x, dim, slots * rows, layers, at, rope + first * cache.head_dim, hidden.data(), threads);
        const Weight head = read_weight(heads + (codebook - 1) * WEIGHT_VALUES);
        logits.resize(slots * head.n);
        norm_linear<T>(hidden.data() + (rows - 1) * dim, rows * dim, slots, norm, layers.eps, head, logits.data(),
                       threads);
        sample<T>(logits.data(), head.n, slots, head.n, draws, codebook, codes, codes_stride);
        for (int64_t slot = 0; slot < slots && codebook + 1 < num_codebooks; slot++) {
            const int64_t row = codebook * table_step + codes[slot * codes_stride + codebook];
            const T* own = table.row(row, embedded.data() + slot * dim);
            if (!own) return row;
            if (table.rows) std::copy(own, own + dim, embedded.data() + slot * dim);
        }
        x = embedded.data();
    }
    return 0;
}

}  // namespace
}  // namespace csm

using csm::Cache;
using csm::Kind;
using csm::Weight;

#define CSM_FOR_DTYPE(call)               \
    if (dtype == csm::FLOAT32) {          \
        using T = float;                  \
        call;                             \
    } else {                              \
        using T = csm::bf16;              \
        call;                             \
    }
#define CSM_IN(type, name) static_cast<const type*>(name)
#define CSM_OUT(type, name) static_cast<type*>(name)

extern "C" {

const char* csm_isa() { return CSM_ISA; }

void csm_norm_linear(int64_t dtype, const void* x, int64_t x_stride, int64_t rows, const void* norm, float eps,
                     int64_t kind, const void* w, int64_t n, int64_t k, void* out, int64_t threads) {
    const Weight weight{Kind(kind), w, n, k};
    CSM_FOR_DTYPE(csm::norm_linear(CSM_IN(T, x), x_stride, rows, CSM_IN(T, norm), eps, weight, CSM_OUT(T, out), threads))
}

void csm_norm_swiglu(int64_t dtype, const void* x, int64_t x_stride, int64_t rows, const void* norm, float eps,
                     int64_t kind, const void* w, int64_t n, int64_t k, void* out, int64_t threads) {
    const Weight weight{Kind(kind), w, n, k};
    CSM_FOR_DTYPE(csm::norm_swiglu(CSM_IN(T, x), x_stride, rows, CSM_IN(T, norm), eps, weight, CSM_OUT(T, out), threads))
}

void csm_linear_add(int64_t dtype, const void* x, int64_t x_stride, int64_t rows, int64_t kind, const void* w,
                    int64_t n, int64_t k, const void* residual, int64_t residual_stride, void* out, int64_t threads) {
    const Weight weight{Kind(kind), w, n, k};
    CSM_FOR_DTYPE(csm::linear_add(CSM_IN(T, x), x_stride, rows, weight, CSM_IN(T, residual), residual_stride,
                                  CSM_OUT(T, out), threads))
}

void csm_norm_rope_cache(int64_t dtype, const void* x, int64_t x_stride, int64_t rows, const void* norm, float eps,
                         int64_t kind, const void* w, int64_t n, int64_t k, const float* rope, const int64_t* slots,
                         const int64_t* positions, int64_t position_stride, int64_t rows_per_slot, void* keys,
                         void* values, int64_t slot_stride, int64_t head_stride, int64_t num_heads, int64_t head_dim,
                         void* q, int64_t threads) {
    const Weight weight{Kind(kind), w, n, k};
    const Cache cache{slots,       positions,   position_stride, rows_per_slot,
                      slot_stride, head_stride, num_heads,       head_dim};
    CSM_FOR_DTYPE(csm::norm_rope_cache(CSM_IN(T, x), x_stride, rows, CSM_IN(T, norm), eps, weight, cache, rope,
                                       CSM_OUT(T, q), CSM_OUT(T, keys), CSM_OUT(T, values), threads))
}

void csm_attention_linear_add(int64_t dtype, const void* q, int64_t rows, int64_t num_queries, const void* keys,
                              const void* values, const int64_t* positions, int64_t position_stride,
                              int64_t rows_per_slot, int64_t slot_stride, int64_t head_stride, int64_t num_heads,
                              int64_t head_dim, int64_t kind, const void* w, int64_t n, int64_t k,
                              const void* residual, int64_t residual_stride, void* out, int64_t threads) {
    const Weight weight{Kind(kind), w, n, k};
    const Cache cache{nullptr,     positions,   position_stride, rows_per_slot,
                      slot_stride, head_stride, num_heads,       head_dim};
    CSM_FOR_DTYPE(csm::attention_linear_add(CSM_IN(T, q), rows, num_queries, CSM_IN(T, keys), CSM_IN(T, values), cache,
                                            weight, CSM_IN(T, residual), residual_stride, CSM_OUT(T, out), threads))
}

void csm_blocks(int64_t dtype, const void* x, int64_t x_stride, int64_t rows, int64_t num_layers, const int64_t* layers,
                float eps, const float* rope, const int64_t* slots, const int64_t* positions, int64_t position_stride,
                int64_t rows_per_slot, void* keys, void* values, int64_t layer_stride, int64_t slot_stride,
                int64_t head_stride, int64_t num_heads, int64_t head_dim, void* out, int64_t threads) {
    const Cache cache{slots,       positions,   position_stride, rows_per_slot,
                      slot_stride, head_stride, num_heads,       head_dim};
    CSM_FOR_DTYPE(csm::blocks<T>(CSM_IN(T, x), x_stride, rows,
                                 {num_layers, layers, eps, CSM_OUT(T, keys), CSM_OUT(T, values), layer_stride}, cache,
                                 rope, CSM_OUT(T, out), threads))
}

// Whether all rows could be read.
int64_t csm_embed_rows(int64_t dtype, const int64_t* ids, const bool* mask, int64_t rows, const int64_t* offsets,
                       int64_t num_codebooks, int64_t dim, const void* audio, int64_t audio_file, int64_t audio_offset,
                       int64_t audio_count, const void* text, int64_t text_file, int64_t text_offset,
                       int64_t text_count, void* out, int64_t threads) {
    CSM_FOR_DTYPE(return csm::embed_rows<T>(ids, mask, rows, offsets, num_codebooks,
                                            {CSM_IN(T, audio), audio_file, audio_offset, audio_count, dim},
                                            {CSM_IN(T, text), text_file, text_offset, text_count, dim},
                                            CSM_OUT(T, out), threads))
}

void csm_sample(int64_t dtype, const void* logits, int64_t stride, int64_t slots, int64_t size, const int64_t* seeds,
                const int64_t* frames, const float* temperatures, const int64_t* top_k, int64_t codebook,
                int64_t* codes, int64_t codes_stride) {
    const csm::Draws draws{seeds, frames, temperatures, top_k};
    CSM_FOR_DTYPE(csm::sample(CSM_IN(T, logits), stride, slots, size, draws, codebook, codes, codes_stride))
}

// Returns the row of the table that could not be read, or 0.
int64_t csm_depth_codes(int64_t dtype, const void* x, int64_t slots, int64_t num_codebooks, int64_t num_layers,
                        const int64_t* layers, float eps, const float* rope, const int64_t* cache_slots,
                        const int64_t* positions, int64_t position_stride, void* keys, void* values,
                        int64_t layer_stride, int64_t slot_stride, int64_t head_stride, int64_t num_heads,
                        int64_t head_dim, const void* norm, const int64_t* heads, const void* table, int64_t file,
                        int64_t offset, int64_t count, int64_t dim, int64_t table_step, const int64_t* seeds,
                        const int64_t* frames, const float* temperatures, const int64_t* top_k, int64_t* codes,
                        int64_t codes_stride, int64_t threads) {
    const Cache cache{cache_slots, positions,   position_stride, 1,
                      slot_stride, head_stride, num_heads,       head_dim};
    const csm::Draws draws{seeds, frames, temperatures, top_k};
    CSM_FOR_DTYPE(return csm::depth_codes<T>(
        CSM_IN(T, x), slots, num_codebooks,
        {num_layers, layers, eps, CSM_OUT(T, keys), CSM_OUT(T, values), layer_stride}, cache, rope, CSM_IN(T, norm),
        heads, {CSM_IN(T, table), file, offset, count, dim}, table_step, draws, codes, codes_stride, threads))
}

void csm_quantize(int64_t dtype, const void* x, int64_t n, int64_t k, const float* importance, int64_t kind,
                  float least, float largest, const float* extremes, int64_t count, void* out, int64_t threads) {
    const Weight packed{Kind(kind), out, n, k};
    const csm::Levels levels{least, largest, extremes, count};
    uint8_t* tiles = CSM_OUT(uint8_t, out);
    csm::parallel(threads, (n + csm::LANES - 1) / csm::LANES, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; tile++) {
            uint8_t* to = tiles + tile * packed.pairs() * packed.pair_bytes();
            CSM_FOR_DTYPE(csm::quantise_tile(CSM_IN(T, x), n, k, tile * csm::LANES, importance, levels, packed, to))
        }
    });
}

}  // extern "C"
