// Runs sparse_mma.cu on the CPU: one block after the other, every thread of a block a real one.
//
// Copies in the background arrive as late as they may, so a missing wait shows; a missing barrier or
// an access out of bounds shows to the sanitizers. What mma.sp, wgmma
// (with -DWARPGROUP) and ldmatrix do is written down here from the PTX ISA, apart from the kernel.
//
// Usage: simulated_gpu float16|bfloat16 ROWS COLUMNS TOKENS OUTPUTS 0|1 < values, metadata, x, bias > y

#include <barrier>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define SIMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
    int x, y;
};

struct Copy {
    void* to;
    const void* from;
    bool inside;
};

struct Warp {
    std::barrier<> meet{32};
    const unsigned short* rows[32];
    unsigned a[32][4], b[32][4], metadata[32];
};

static thread_local Index threadIdx, blockIdx;
static thread_local Warp* warp;
static thread_local std::barrier<>* block;
static thread_local std::vector<std::vector<Copy>> groups;
static thread_local std::vector<Copy> open_group;

static int own_lane() { return threadIdx.x % 32; }

static void __syncthreads() { block->arrive_and_wait(); }

static void copy_async(void* to, const void* from, bool inside) {
    if ((std::bit_cast<std::size_t>(to) | std::bit_cast<std::size_t>(from)) % 16) std::abort();
    open_group.push_back({to, from, inside});
}

static void commit_copies() { groups.push_back(std::exchange(open_group, {})); }

template <int left>
static void wait_for_copies() {
    for (; groups.size() > left; groups.erase(groups.begin()))
        for (const Copy& copy : groups.front())
            copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

// Lane 4 g + t receives elements 2 t and 2 t + 1 of row g of every matrix.
static void load_matrices(unsigned (&to)[4], const unsigned short* row) {
    if (std::bit_cast<std::size_t>(row) % 16) std::abort();
    warp->rows[own_lane()] = row;
    warp->meet.arrive_and_wait();
    for (int i = 0; i < 4; ++i)
        std::memcpy(&to[i], warp->rows[i * 8 + own_lane() / 4] + own_lane() % 4 * 2, 4);
    warp->meet.arrive_and_wait();
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

// One entry of a sparse product: a is stored as 16 x 16, of four columns two; b(k) is its column.
template <bool bfloat, int selector, typename Column>
static float entry(int row, Column b) {
    float sum = 0;
    for (int group = 0; group < 8; ++group) {
        const unsigned word = warp->metadata[row % 8 * 4 + selector * 2 + group / 4];
        const unsigned two = word >> (row / 8 * 16 + group % 4 * 4) & 15;
        if ((two & 3) >= two >> 2) std::abort();  // ordered_metadata promises an order
        for (int which = 0; which < 2; ++which) {
            const int stored = group * 2 + which;
            const unsigned of_a = warp->a[row % 8 * 4 + stored % 8 / 2][stored / 8 * 2 + row / 8];
            sum += widen<bfloat>(half_of(of_a, stored % 2)) *
                   widen<bfloat>(b(group * 4 + (two >> which * 2 & 3)));
        }
    }
    return sum;
}

static int own_row(int r) { return own_lane() / 4 + r / 2 * 8; }
static int own_column(int r) { return own_lane() % 4 * 2 + r % 2; }

#ifdef WARPGROUP

using Matrix = const unsigned short*;

static Matrix describe(const unsigned short* first) { return first; }
static void publish_copies() {}
static void begin_products() {}
static void finish_products() {}

// wgmma.mma_async.sp.m64n64k32, the 16 rows of one warp; b is in shared memory, 64 rows of 128 bytes
// with bits 4-6 of each address changed by bits 7-9.
template <bool bfloat>
static void multiply(float (&sums)[8][4], const unsigned (&a)[4], Matrix b, unsigned metadata) {
    std::memcpy(warp->a[own_lane()], a, 16);
    warp->metadata[own_lane()] = metadata;
    warp->meet.arrive_and_wait();
    for (int j = 0; j < 8; ++j)
        for (int r = 0; r < 4; ++r)
            sums[j][r] += entry<bfloat, 0>(own_row(r), [&](int k) {
                const auto address = std::bit_cast<std::size_t>(b) + j * 1024 +
                                     own_column(r) * 128 + k * sizeof(short);
                return *std::bit_cast<Matrix>(address ^ (address >> 7 & 7) << 4);
            });
    warp->meet.arrive_and_wait();
}

#else

// mma.sp.m16n8k32: b is 32 x 8, in registers.
template <bool bfloat, int selector>
static void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[4],
                     unsigned metadata) {
    std::memcpy(warp->a[own_lane()], a, 16);
    std::memcpy(warp->b[own_lane()], b, 16);
    warp->metadata[own_lane()] = metadata;
    warp->meet.arrive_and_wait();
    for (int r = 0; r < 4; ++r)
        sums[r] += entry<bfloat, selector>(own_row(r), [&](int k) {
            return half_of(warp->b[own_column(r) * 4 + k % 8 / 2][k / 8], k % 2);
        });
    warp->meet.arrive_and_wait();
}

#endif

#include "sparse_mma.cu"

// Exactly as large as the kernel may touch.
template <typename T>
static std::vector<T> read_array(std::size_t count) {
    std::vector<T> array(count);
    if (std::fread(array.data(), sizeof(T), count, stdin) != count) std::abort();
    return array;
}

int main(int, char** arguments) {
    const bool bfloat = std::string(arguments[1]) == "bfloat16";
    const std::size_t rows = std::atoi(arguments[2]), columns = std::atoi(arguments[3]);
    const std::size_t tokens = std::atoi(arguments[4]), outputs = std::atoi(arguments[5]);
    const auto values = read_array<u16>(rows * columns / 2);
    const auto metadata = read_array<u32>(rows * columns / 32);
    const auto x = read_array<u16>(tokens * columns);
    const auto bias = read_array<u16>(arguments[6][0] == '1' ? outputs : 0);
    std::vector<u16> y(tokens * outputs, 0xffff);  // NaN, should the kernel leave one out

    const auto kernel = bfloat ? sparse_linear_bfloat16 : sparse_linear_float16;
    for (int by = 0; by < int(rows) / BLOCK_ROWS; ++by)
        for (int bx = 0; bx * BLOCK_TOKENS < int(tokens); ++bx) {
            std::barrier<> meet(THREADS);
            std::vector<Warp> warps(THREADS / 32);
            std::vector<std::jthread> threads;
            for (int thread = 0; thread < THREADS; ++thread)
                threads.emplace_back([&, thread] {
                    threadIdx = {thread, 0};
                    blockIdx = {bx, by};
                    warp = &warps[thread / 32];
                    block = &meet;
                    kernel(values.data(), metadata.data(), x.data(), bias.empty() ? nullptr : bias.data(),
                           y.data(), rows, columns, tokens, outputs);
                });
        }
    std::fwrite(y.data(), sizeof(u16), y.size(), stdout);
}
