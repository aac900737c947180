// Threads that run one function together and meet at barriers. A waiting thread spins for some microseconds and then
// sleeps in the kernel, so that an idle pool costs nothing and a crowded machine gets its cores back.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// A moment's rest for the other thread of this core, but not at every turn: a virtual machine's host takes many pauses
// in a row for a lock that is held, and gives the core away.
static inline void relax(int turn) {
    if (turn % 64 != 63) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
   public:
    explicit Pool(int num_threads) : num_threads_(num_threads) {
        try {
            for (int thread = 1; thread < num_threads; thread++)
                threads_.emplace_back([this, thread] { work(thread); });
        } catch (...) {
            end();
            throw;
        }
    }

    ~Pool() { end(); }

    int num_threads() const { return num_threads_; }

    // `run(argument, thread)` on every thread, this one included; returns when all are through.
    void run(void (*function)(void*, int), void* argument) {
        next_task_.store(0, std::memory_order_relaxed);
        if (num_threads_ == 1) return function(argument, 0);
        function_ = function;
        argument_ = argument;
        start();
        function(argument, 0);
        barrier();
    }

    // All threads reach this before any goes on; the tasks of the next phase start at 0.
    void barrier() {
        if (num_threads_ == 1) {
            next_task_.store(0, std::memory_order_relaxed);
            return;
        }
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
            num_arrived_.store(0, std::memory_order_relaxed);
            next_task_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
        } else {
            wait_while(phase_, phase, NUM_SPINS_BARRIER);
        }
    }

    // The next `count` of a phase's tasks: whoever is free takes them.
    int take(int count) { return next_task_.fetch_add(count, std::memory_order_relaxed); }

   private:
    static constexpr int NUM_SPINS_BARRIER = 50000;
    static constexpr int NUM_SPINS_IDLE = 10000;

    static void wait_while(std::atomic<uint32_t>& value, uint32_t old, int num_spins) {
        for (int spin = 0; spin < num_spins; spin++) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax(spin);
        }
        while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
    }

    void end() {
        is_over_ = true;
        start();
        for (auto& thread : threads_) thread.join();
    }

    void start() {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }

    void work(int thread) {
        uint32_t seen = 0;
        while (true) {
            wait_while(generation_, seen, NUM_SPINS_IDLE);
            seen++;
            if (is_over_) return;
            function_(argument_, thread);
            barrier();
        }
    }

    const int num_threads_;
    void (*function_)(void*, int) = nullptr;
    void* argument_ = nullptr;
    std::atomic<bool> is_over_{false};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> num_arrived_{0};
    alignas(64) std::atomic<int> next_task_{0};
    std::vector<std::thread> threads_;
};
