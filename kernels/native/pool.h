// Threads for work that is cut into parts and lasts microseconds.
//
// OpenMP's barrier waits for every thread, one that another process keeps from running too, and waits by spinning. Here
// a thread that has done its own part goes on with what is left of the others', so one that does not run holds up
// nobody; who has nothing to do spins shortly, then sleeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#else
inline int getpid() { return 0; }
#endif

namespace csm {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// All calls of a piece of work run the same instructions. Inlined in several places, the compiler could fuse its
// multiplications and additions differently, and a result would depend on who computed it.
#if defined(_MSC_VER)
#define CSM_NOINLINE __declspec(noinline)
#else
#define CSM_NOINLINE __attribute__((noinline))
#endif
template <class F>
CSM_NOINLINE void apply(const F& f, int64_t first, int64_t last) {
    f(first, last);
}

class Pool {
   public:
    // The pool of this process: a child of a fork has none of its parent's threads.
    static Pool& instance() {
        static std::mutex guard;
        static Pool* pool = nullptr;  // never destroyed: its threads outlive every caller
        std::lock_guard<std::mutex> lock(guard);
        if (!pool || pool->process_ != getpid()) pool = new Pool;
        return *pool;
    }

    // f(first, last) over all of 0..n, in pieces of `piece`, on up to `threads` threads: this one, and a thread's own
    // part is always the same. Where the pool is taken by another caller, on this thread alone.
    template <class F>
    void run(int64_t threads, int64_t n, int64_t piece, const F& f) {
        threads = std::min(threads, (n + piece - 1) / piece);
        if (threads <= 1 || !taken_.try_lock()) {
            if (n > 0) apply(f, 0, n);
            return;
        }
        std::lock_guard<std::mutex> release(taken_, std::adopt_lock);
        prepare(threads, n, piece);
        call_ = [](const void* g, int64_t first, int64_t last) { apply(*static_cast<const F*>(g), first, last); };
        context_ = &f;
        open_.store(true);
        generation_.fetch_add(1);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        work(0);
        open_.store(false);  // all pieces are taken: who is still inside works on the last ones
        wait_until_nobody_is_inside();
    }

   private:
    struct alignas(64) Part {
        std::atomic<int64_t> next{0};
        int64_t last = 0;
    };
    static constexpr int SPINS = 2000;  // of a few tens of nanoseconds: longer than from one op to the next

    void prepare(int64_t threads, int64_t n, int64_t piece) {
        if (int64_t(parts_size_) < threads) {
            parts_.reset(new Part[threads]);
            parts_size_ = threads;
        }
        while (started_ < threads - 1) {
            const int64_t index = ++started_;
            std::thread([this, index] { serve(index); }).detach();
        }
        threads_ = threads, piece_ = piece;
        for (int64_t i = 0; i < threads; i++) {
            parts_[i].next.store(n * i / threads, std::memory_order_relaxed);
            parts_[i].last = n * (i + 1) / threads;
        }
    }

    void work(int64_t index) {
        for (int64_t i = 0; i < threads_; i++) {
            Part& part = parts_[(index + i) % threads_];
            for (;;) {
                const int64_t first = part.next.fetch_add(piece_, std::memory_order_relaxed);
                if (first >= part.last) break;
                call_(context_, first, std::min(first + piece_, part.last));
            }
        }
    }

    void serve(int64_t index) {
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < SPINS && generation_.load(std::memory_order_relaxed) == seen; i++) pause();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = generation_.load();
            inside_.fetch_add(1);  // from here to the end the work stays as it is
            if (open_.load() && index < threads_) work(index);
            inside_.fetch_sub(1);
            if (waiting_.load()) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }

    void wait_until_nobody_is_inside() {
        for (int i = 0; i < SPINS && inside_.load() != 0; i++) pause();
        if (inside_.load() == 0) return;
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_.store(true);
        done_.wait(lock, [&] { return inside_.load() == 0; });
        waiting_.store(false);
    }

    const int process_ = getpid();
    std::mutex taken_, mutex_;
    std::condition_variable wake_, done_;
    std::unique_ptr<Part[]> parts_;
    int64_t parts_size_ = 0, started_ = 0, threads_ = 0, piece_ = 1;
    void (*call_)(const void*, int64_t, int64_t) = nullptr;
    const void* context_ = nullptr;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int64_t> inside_{0}, sleeping_{0};
    std::atomic<bool> open_{false}, waiting_{false};
};

}  // namespace csm
