// y = x W^T + b with W 2:4, by wgmma.mma_async.sp on Hopper (sm_90a): the kernel for many tokens,
// where multiplying is the bottleneck.
//
// A block multiplies 128 rows of W with 64, 128 or 256 tokens, in steps of 64 columns. One producer
// warp copies the operands by TMA, up to four steps ahead. Two consumer warpgroups multiply 64 rows
// each, by wgmma of 64 x tokens x 32 with both operands in shared memory. The stages are a ring
// buffer: the barrier `full` of a stage says that its copies have arrived, `empty` that every
// consumer warp has multiplied it. While one warpgroup waits for its products, the tensor cores
// compute those of the other. Where there are too few tiles to occupy the GPU, gridDim.z blocks
// share a tile (split-K).
//
// The layout of W is described in sparse_tile.cuh. In wgmma a warp holds 16 rows, and its lanes 4 g
// and 4 g + 1 give the columns of the values of rows g and g + 8.
//
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": fragments, matrix
// descriptors and swizzling of wgmma; "Data Movement and Conversion Instructions: Bulk copy";
// "mbarrier". CUTLASS, mma_traits_sm90_gmma_sparse.hpp, ELayout_64x32: its metadata.

#include "sparse_tile.cuh"

namespace wgmma {

constexpr int STAGES = 4;
constexpr int CONSUMERS = 256;
constexpr int THREADS = CONSUMERS + 32;

#ifndef SIMULATED

// A TMA descriptor, which the driver makes from an address, sizes and a swizzle mode; opaque.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

using Barrier = u64;

// Make a barrier whose phase ends after `arrivals` arrivals and all bytes that were announced.
__device__ __forceinline__ void make_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Make the new barriers visible to TMA.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Arrive, and announce copies of `bytes` bytes in all.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

// Wait for the end of a phase; the first phase is number 0.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, int phase) {
    u32 done;
    do {
        asm volatile(
            "{.reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;"
            " selp.u32 %0, 1, 0, done;}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(phase & 1)
            : "memory");
    } while (!done);
}

// Copy a box of a matrix, with zeros where the box reaches outside the matrix.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* from, int column, int row,
                                         Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
        "l"(from), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes,
                                           Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The wgmma descriptor of a matrix in shared memory with rows of 64 or 128 bytes, swizzled by TMA
// in pieces of 16 bytes: bits 4 and 5 of an address are XORed with bits 7 and 8 (64 bytes), or bits
// 4-6 with bits 7-9 (128 bytes).
using Matrix = u64;

template <int row_bytes>
__device__ __forceinline__ Matrix describe(const u16* first) {
    static_assert(row_bytes == 64 || row_bytes == 128);
    constexpr Matrix swizzle = Matrix(row_bytes == 64 ? 2 : 1) << 62;
    constexpr Matrix eight_rows = Matrix(8 * row_bytes / 16) << 32;
    return swizzle | eight_rows | Matrix(1) << 16 | (shared_address(first) & 0x3ffff) >> 4;
}

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most `left` of the committed groups of products are unfinished.
template <int left>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

#define TEN(d)                                                                              \
    "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d \
    "8, %" #d "9, "
#define SUMS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define SUMS_8(j) \
    SUMS(j), SUMS(j + 1), SUMS(j + 2), SUMS(j + 3), SUMS(j + 4), SUMS(j + 5), SUMS(j + 6), SUMS(j + 7)
#define WGMMA_SP(SIZE, TYPE, REGISTERS, OPERANDS, ...)                                             \
    asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0;"                                         \
                 "wgmma.mma_async.sp.sync.aligned.m64n" SIZE "k32.f32." TYPE "." TYPE              \
                 " {" REGISTERS "}, " OPERANDS ", 0, add, 1, 1, 0, 0;}"                            \
                 : __VA_ARGS__                                                                     \
                 : "l"(a), "l"(b), "r"(metadata))
#define WGMMA_SP_64(TYPE)                                                                   \
    WGMMA_SP("64", TYPE, TEN() TEN(1) TEN(2) "%30, %31", "%32, %33, %34", SUMS_8(0))
#define WGMMA_SP_128(TYPE)                                                             \
    WGMMA_SP("128", TYPE, TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63", \
             "%64, %65, %66", SUMS_8(0), SUMS_8(8))
#define WGMMA_SP_256(TYPE)                                                                     \
    WGMMA_SP("256", TYPE,                                                                      \
             TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
             "%120, %121, %122, %123, %124, %125, %126, %127",                                 \
             "%128, %129, %130", SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24))

// sums += a b for the 64 rows of a warpgroup; the `metadata` of lanes 4 g and 4 g + 1 give the
// columns of a's values.
template <bool bfloat, int tiles>
__device__ __forceinline__ void multiply(float (&sums)[tiles][4], Matrix a, Matrix b,
                                         u32 metadata) {
    if constexpr (tiles == 8) {
        if constexpr (bfloat) {
            WGMMA_SP_64("bf16");
        } else {
            WGMMA_SP_64("f16");
        }
    } else if constexpr (tiles == 16) {
        if constexpr (bfloat) {
            WGMMA_SP_128("bf16");
        } else {
            WGMMA_SP_128("f16");
        }
    } else {
        static_assert(tiles == 32);
        if constexpr (bfloat) {
            WGMMA_SP_256("bf16");
        } else {
            WGMMA_SP_256("f16");
        }
    }
}

#endif

// Aligned as TMA's swizzling requires.
template <int block_tokens>
struct alignas(1024) Stage {
    u16 values[BLOCK_ROWS * BLOCK_COLUMNS / 2];
    u16 inputs[block_tokens * BLOCK_COLUMNS];
    u32 metadata[2][BLOCK_ROWS];
};

template <int block_tokens>
struct Shared {
    Stage<block_tokens> stages[STAGES];
    Barrier full[STAGES], empty[STAGES];
};

// The tile of a block. Blocks that run at the same time should read the same rows and tokens, so
// that the L2 cache serves them: the order goes through all rows with eight tiles of tokens before
// it takes the next eight.
__device__ __forceinline__ Place place(int block, int rows, int tokens, int block_tokens) {
    constexpr int band_width = 8;
    const int high = rows / BLOCK_ROWS, wide = (tokens + block_tokens - 1) / block_tokens;
    const int band = block / (band_width * high), left = wide - band * band_width;
    const int width = left < band_width ? left : band_width;
    const int within = block - band * band_width * high;
    return {within / width * BLOCK_ROWS, (band * band_width + within % width) * block_tokens};
}

template <bool bfloat, int block_tokens>
__device__ __forceinline__ void sparse_linear(const TensorMap* values, const TensorMap* x,
                                              const u32* metadata, const u16* bias, u16* y,
                                              Sums* partial, u32* arrivals, int rows, int columns,
                                              int tokens, int outputs) {
    Shared<block_tokens>& shared = *reinterpret_cast<Shared<block_tokens>*>(shared_memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const bool consumer = thread < CONSUMERS;
    const Place at = place(blockIdx.x, rows, tokens, block_tokens);

    const int all_steps = columns / BLOCK_COLUMNS, splits = gridDim.z, split = blockIdx.z;
    const int first_step = i64(all_steps) * split / splits;
    const int steps = i64(all_steps) * (split + 1) / splits - first_step;

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            make_barrier(&shared.full[stage], 1);
            make_barrier(&shared.empty[stage], CONSUMERS / 32);
        }
        publish_barriers();
    }
    __syncthreads();

    const int group_row = warp / 4 * 64, warp_row = warp * 16;
    float sums[block_tokens / 8][4] = {};
    if (!consumer) {
        for (int step = 0; lane == 0 && step < steps; ++step) {
            Stage<block_tokens>& stage = shared.stages[step % STAGES];
            Barrier* full = &shared.full[step % STAGES];
            if (step >= STAGES) wait_for_phase(&shared.empty[step % STAGES], step / STAGES - 1);
            arrive_and_expect(full, sizeof stage.values + sizeof stage.inputs + sizeof stage.metadata);
            const int column = (first_step + step) * BLOCK_COLUMNS;
            copy_box(stage.values, values, column / 2, at.first_row, full);
            copy_box(stage.inputs, x, column, at.first_token, full);
            for (int half = 0; half < 2; ++half)
                copy_bytes(stage.metadata[half], metadata + i64(column / 32 + half) * rows + at.first_row,
                           sizeof stage.metadata[half], full);
        }
    } else {
        // wgmma always reads the metadata of lanes 4 g and 4 g + 1, so a warp with odd number loads
        // the words of lanes 4 g + 2 and 4 g + 3 into them.
        const int word_at = warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2 + lane % 2;
        for (int step = 0; step < steps; ++step) {
            const Stage<block_tokens>& stage = shared.stages[step % STAGES];
            wait_for_phase(&shared.full[step % STAGES], step / STAGES);
            u32 words[2];
            for (int half = 0; half < 2; ++half) words[half] = stage.metadata[half][word_at];
            begin_products();
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply<bfloat>(
                    sums,
                    describe<BLOCK_COLUMNS>(
                        &stage.values[group_row * (BLOCK_COLUMNS / 2) + half * 16]),
                    describe<BLOCK_COLUMNS * 2>(&stage.inputs[half * 32]), words[half]);
            commit_products();
            // The products read `words`, so these must not change before they finish: if the next
            // words were loaded while products run, ptxas would put a wait behind every product
            // (C7513). During this wait the other warpgroup keeps the tensor cores busy.
            wait_for_products<0>();
            __syncwarp();  // all lanes have read their words
            if (lane == 0) arrive(&shared.empty[step % STAGES]);
        }
    }
    __syncwarp();

    if (splits > 1) {
        const Shares shares{partial, arrivals, int(blockIdx.x), split, splits};
        constexpr int count = block_tokens / 8;
        if (consumer) leave(shares.of(split, count, CONSUMERS), CONSUMERS, sums);
        if (!shares.arrive_last()) return;
        if (consumer) gather(sums, shares, CONSUMERS);
    }

    // All copies have arrived, so the stages' memory can be reused once all warps have multiplied.
    u16* staged = reinterpret_cast<u16*>(shared_memory);
    __syncthreads();
    if (consumer) {
        float offset[2];
        load_bias<bfloat>(offset, bias, at.first_row + warp_row, outputs, lane);
#pragma unroll
        for (int j = 0; j < block_tokens / 8; ++j)
            stage_sums<bfloat>(staged, sums[j], warp_row, j * 8, offset, lane);
    }
    __syncthreads();
    if (consumer) write_tile<block_tokens, CONSUMERS>(staged, y, at, tokens, outputs, thread);
}

}  // namespace wgmma

#define KERNEL(NAME, BFLOAT, BLOCK_TOKENS)                                                         \
    extern "C" __global__ void __launch_bounds__(wgmma::THREADS, 1)                                \
        NAME(const __grid_constant__ wgmma::TensorMap values,                                      \
             const __grid_constant__ wgmma::TensorMap x, const u32* metadata, const u16* bias,     \
             u16* y, Sums* partial, u32* arrivals, int rows, int columns, int tokens,              \
             int outputs) {                                                                        \
        wgmma::sparse_linear<BFLOAT, BLOCK_TOKENS>(&values, &x, metadata, bias, y, partial,        \
                                                   arrivals, rows, columns, tokens, outputs);      \
    }

KERNEL(sparse_wgmma_64_float16, false, 64)
KERNEL(sparse_wgmma_128_float16, false, 128)
KERNEL(sparse_wgmma_256_float16, false, 256)
KERNEL(sparse_wgmma_64_bfloat16, true, 64)
KERNEL(sparse_wgmma_128_bfloat16, true, 128)
KERNEL(sparse_wgmma_256_bfloat16, true, 256)
#undef KERNEL
