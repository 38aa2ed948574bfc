// sparse_mma.cu and sparse_wgmma.cu on the CPU: one block after the other, every thread of a block a
// real one.
//
// Copies in the background arrive, and products in the background are made, as late as they may, so
// a missing wait shows; a missing barrier or an access out of bounds shows to the sanitizers. What
// mma.sp, wgmma, ldmatrix, mbarriers and TMA do is written down here from the PTX ISA, apart from
// the kernels.
//
// simulated_program.cpp makes a program of it, for sanitizers; simulated_driver.cpp what
// cuda_module.py loads in place of the CUDA driver.

#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define SIMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads, blocks)

struct Index {
    int x, y, z;
};

struct Copy {
    void* to;
    const void* from;
    bool inside;
};

// Groups of what goes on in the background of a thread, the oldest first.
template <typename Work>
struct Background {
    std::vector<std::vector<Work>> groups;
    std::vector<Work> open;

    void commit() { groups.push_back(std::exchange(open, {})); }

    template <typename Do>
    void wait(std::size_t left, Do&& finish) {
        for (; groups.size() > left; groups.erase(groups.begin()))
            for (const Work& work : groups.front()) finish(work);
    }
};

struct Warp {
    std::barrier<> meet{32};
    const unsigned short* rows[32];
    unsigned a[32][4], b[32][4], metadata[32];
};

struct Block {
    std::barrier<> all;
    std::atomic<bool> any = false;
    std::vector<Warp> warps;
    explicit Block(int threads) : all(threads), warps(threads / 32) {}
};

static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static thread_local Warp* warp;
static thread_local Block* block;
static thread_local unsigned char* shared_memory;
static thread_local Background<Copy> copies;
static thread_local Background<std::function<void()>> products;

static int own_lane() { return threadIdx.x % 32; }

static void __syncthreads() { block->all.arrive_and_wait(); }

static bool __syncthreads_or(bool value) {
    if (value) block->any = true;
    __syncthreads();
    const bool any = block->any;
    __syncthreads();
    return any;
}

static void __syncwarp() { warp->meet.arrive_and_wait(); }

static void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

static unsigned atomicInc(unsigned* counter, unsigned most) {
    const unsigned old = *counter;  // blocks run one after the other
    *counter = old >= most ? 0 : old + 1;
    return old;
}

template <bool bfloat>
static float widen(unsigned short bits) {
    if constexpr (bfloat) return std::bit_cast<float>(unsigned(bits) << 16);
    return float(std::bit_cast<_Float16>(bits));
}

template <bool bfloat>
static unsigned short narrow(float value) {
    if constexpr (bfloat) {
        const unsigned bits = std::bit_cast<unsigned>(value);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    return std::bit_cast<unsigned short>(_Float16(value));
}

static unsigned short half_of(unsigned word, int which) { return word >> 16 * which; }

static int own_row(int r) { return own_lane() / 4 + r / 2 * 8; }
static int own_column(int r) { return own_lane() % 4 * 2 + r % 2; }

// One entry of a sparse product of 32 columns, of which a(i) is the i-th of 16 stored values of a row
// and b(k) the column. words[0] and words[1] say where the values of groups 0-3 and 4-7 are, of a
// lane's rows g (r < 2) and g + 8.
template <bool bfloat, typename A, typename B>
static float entry(const unsigned (&words)[2], int r, A a, B b) {
    float sum = 0;
    for (int group = 0; group < 8; ++group) {
        const unsigned two = words[group / 4] >> (r / 2 * 16 + group % 4 * 4) & 15;
        if ((two & 3) >= two >> 2) std::abort();  // ordered_metadata promises an order
        for (int which = 0; which < 2; ++which)
            sum += widen<bfloat>(a(group * 2 + which)) *
                   widen<bfloat>(b(group * 4 + (two >> which * 2 & 3)));
    }
    return sum;
}

// The words of two lanes of the own four, from `first` on. All lanes of a warp meet in it.
struct Words {
    unsigned of[2];
    Words(unsigned own, int first) {
        warp->metadata[own_lane()] = own;
        warp->meet.arrive_and_wait();
        for (int i = 0; i < 2; ++i) of[i] = warp->metadata[own_lane() / 4 * 4 + first + i];
        warp->meet.arrive_and_wait();
    }
};

namespace mma {

using u16 = unsigned short;
using u32 = unsigned;

static void copy_async(void* to, const void* from, bool inside) {
    if ((std::bit_cast<std::size_t>(to) | std::bit_cast<std::size_t>(from)) % 16) std::abort();
    copies.open.push_back({to, from, inside});
}

static void commit_copies() { copies.commit(); }

template <int left>
static void wait_for_copies() {
    copies.wait(left, [](const Copy& copy) {
        copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    });
}

// Lane 4 g + t receives elements 2 t and 2 t + 1 of row g of every matrix.
static void load_matrices(u32 (&to)[4], const u16* row) {
    if (std::bit_cast<std::size_t>(row) % 16) std::abort();
    warp->rows[own_lane()] = row;
    warp->meet.arrive_and_wait();
    for (int i = 0; i < 4; ++i)
        std::memcpy(&to[i], warp->rows[i * 8 + own_lane() / 4] + own_lane() % 4 * 2, 4);
    warp->meet.arrive_and_wait();
}

// mma.sp.m16n8k32: a is stored as 16 x 16, b is 32 x 8, both in registers.
template <bool bfloat, int selector>
static void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
    std::memcpy(warp->a[own_lane()], a, 16);
    std::memcpy(warp->b[own_lane()], b, 16);
    const Words words(metadata, selector * 2);
    for (int r = 0; r < 4; ++r)
        sums[r] += entry<bfloat>(
            words.of, r,
            [&](int i) {
                const int lane = own_lane() / 4 * 4 + i % 8 / 2;
                return half_of(warp->a[lane][i / 8 * 2 + r / 2], i % 2);
            },
            [&](int k) {
                return half_of(warp->b[own_column(r) * 4 + k % 8 / 2][k / 8], k % 2);
            });
    warp->meet.arrive_and_wait();
}

}  // namespace mma

namespace wgmma {

using u16 = unsigned short;
using u32 = unsigned;

struct TensorMap {
    const u16* first;
    int rows, columns, box_rows, box_columns;
};

// 16 bytes of a row change places as the swizzling of 64 or 128 bytes wants it.
static std::size_t swizzled(std::size_t address, int row_bytes) {
    return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

// An mbarrier; the copies that report to it are made when a thread waits for them.
struct Barrier {
    std::mutex mutex;
    std::condition_variable changed;
    int arrivals, missing, phase = 0;
    long bytes = 0;
    std::vector<std::function<int()>> copies;

    explicit Barrier(int arrivals) : arrivals(arrivals), missing(arrivals) {}

    void arrive(int expected) {
        const std::lock_guard lock(mutex);
        bytes += expected;
        if (--missing < 0) std::abort();
        end_phase();
    }

    void wait(int parity) {
        std::unique_lock lock(mutex);
        while (phase % 2 == parity) {
            if (copies.empty()) {
                changed.wait(lock);
                continue;
            }
            for (const auto& copy : std::exchange(copies, {})) bytes -= copy();
            end_phase();
        }
    }

    void end_phase() {
        if (missing || bytes) return;
        missing = arrivals;
        ++phase;
        changed.notify_all();
    }
};

static void make_barrier(Barrier* barrier, int arrivals) { new (barrier) Barrier(arrivals); }
static void publish_barriers() {}
static void arrive(Barrier* barrier) { barrier->arrive(0); }
static void arrive_and_expect(Barrier* barrier, int bytes) { barrier->arrive(bytes); }
static void wait_for_phase(Barrier* barrier, int phase) { barrier->wait(phase & 1); }

static void later(Barrier* barrier, std::function<int()> copy) {
    const std::lock_guard lock(barrier->mutex);
    barrier->copies.push_back(std::move(copy));
    barrier->changed.notify_all();
}

static void copy_box(void* to, const TensorMap* from, int column, int row, Barrier* barrier) {
    const int row_bytes = from->box_columns * 2;
    // The pattern of a swizzling repeats after eight rows; rows in memory are aligned to 16 bytes.
    if (std::bit_cast<std::size_t>(to) % (row_bytes * 8) || from->columns % 8) std::abort();
    later(barrier, [=, map = *from] {
        for (int r = 0; r < map.box_rows; ++r)
            for (int c = 0; c < map.box_columns; ++c) {
                const bool inside = row + r < map.rows && column + c < map.columns;
                const auto plain = std::bit_cast<std::size_t>(to) + r * row_bytes + c * 2;
                *std::bit_cast<u16*>(swizzled(plain, row_bytes)) =
                    inside ? map.first[std::size_t(row + r) * map.columns + column + c] : 0;
            }
        return map.box_rows * row_bytes;
    });
}

static void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
    if ((std::bit_cast<std::size_t>(to) | std::bit_cast<std::size_t>(from) | bytes) % 16)
        std::abort();
    later(barrier, [=] {
        std::memcpy(to, from, bytes);
        return bytes;
    });
}

struct Matrix {
    const u16* first;
    int row_bytes;

    u16 at(int row, int column) const {
        const auto plain = std::bit_cast<std::size_t>(first) + row * row_bytes + column * 2;
        return *std::bit_cast<const u16*>(swizzled(plain, row_bytes));
    }
};

template <int row_bytes>
static Matrix describe(const u16* first) {
    return {first, row_bytes};
}

static void begin_products() {}
static void commit_products() { products.commit(); }

// All lanes of a warp meet in it, so that each knows that the products of all are finished.
template <int left>
static void wait_for_products() {
    products.wait(left, [](const std::function<void()>& product) { product(); });
    warp->meet.arrive_and_wait();
}

// wgmma.mma_async.sp.m64nNk32, the 16 rows of one warp.
template <bool bfloat, int tiles>
static void multiply(float (&sums)[tiles][4], Matrix a, Matrix b, u32 metadata) {
    const Words words(metadata, 0);
    const int first_row = threadIdx.x / 32 % 4 * 16;
    products.open.push_back([=, &sums] {
        for (int j = 0; j < tiles; ++j)
            for (int r = 0; r < 4; ++r)
                sums[j][r] += entry<bfloat>(
                    words.of, r, [&](int i) { return a.at(first_row + own_row(r), i); },
                    [&](int k) { return b.at(j * 8 + own_column(r), k); });
    });
}

}  // namespace wgmma

#include "sparse_mma.cu"
#include "sparse_wgmma.cu"

// Run a kernel, the blocks in the reverse order.
template <typename Kernel>
static void run(Index grid, int threads, std::size_t shared_bytes, Kernel kernel) {
    gridDim = grid;
    for (int i = grid.x * grid.y * grid.z; i-- > 0;) {
        Block state(threads);
        void* memory;
        if (posix_memalign(&memory, 1024, shared_bytes)) std::abort();
        {
            std::vector<std::jthread> running;
            for (int thread = 0; thread < threads; ++thread)
                running.emplace_back([&, thread] {
                    threadIdx = {thread, 0, 0};
                    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
                    block = &state;
                    warp = &state.warps[thread / 32];
                    shared_memory = static_cast<unsigned char*>(memory);
                    kernel();
                });
        }
        std::free(memory);
    }
}

#define KERNEL(name) {#name, name}
static const std::map<std::string, decltype(&sparse_mma_8_float16)> mma_kernels = {
    KERNEL(sparse_mma_8_float16),  KERNEL(sparse_mma_8_bfloat16),  KERNEL(sparse_mma_16_float16),
    KERNEL(sparse_mma_16_bfloat16), KERNEL(sparse_mma_32_float16), KERNEL(sparse_mma_32_bfloat16),
    KERNEL(sparse_mma_64_float16), KERNEL(sparse_mma_64_bfloat16)};
static const std::map<std::string, decltype(&sparse_wgmma_64_float16)> wgmma_kernels = {
    KERNEL(sparse_wgmma_64_float16),  KERNEL(sparse_wgmma_64_bfloat16),
    KERNEL(sparse_wgmma_128_float16), KERNEL(sparse_wgmma_128_bfloat16),
    KERNEL(sparse_wgmma_256_float16), KERNEL(sparse_wgmma_256_bfloat16)};

// A barrier takes 8 bytes there, and more here.
static constexpr int MORE_BYTES = 2 * wgmma::STAGES * (sizeof(wgmma::Barrier) - 8);
