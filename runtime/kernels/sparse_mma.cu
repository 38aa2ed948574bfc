// y = x W^T + b with W 2:4, by mma.sp of 16 x 8 x 32, on every GPU from compute capability 8.0 on:
// the kernel for few tokens, where reading W is the bottleneck.
//
// A block multiplies 128 rows of W with 8, 16, 32 or 64 tokens, in steps of 64 columns. While one
// step is multiplied, three more are being copied to shared memory (cp.async). Each of the four
// warps computes 32 rows for all tokens; with 64 tokens, 64 rows for half of them. Where there are
// too few tiles to occupy the GPU, gridDim.z blocks share a tile (split-K).
//
// The arguments and the layout of W are described in sparse_tile.cuh.

#include "sparse_tile.cuh"

namespace mma {

constexpr int STAGES = 4;
constexpr int THREADS = 128;

#ifndef SIMULATED

// Copy 16 bytes to shared memory asynchronously; write zeros if `inside` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Wait until at most `left` of the committed groups of copies are unfinished.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Load four 8 x 8 matrices; lane 8 i + r points at row r of matrix i.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define MMA_SP(TYPE)                                                                            \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE    \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                \
                 "{%0, %1, %2, %3}, %12, %13;"                                                  \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), \
                   "r"(b[3]), "r"(metadata), "n"(selector))

// sums += a b, where a is 2:4. The `metadata` of lanes 4 g + 2 selector and 4 g + 2 selector + 1
// give the columns of a's values.
template <bool bfloat, int selector>
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[4],
                                         u32 metadata) {
    if constexpr (bfloat) {
        MMA_SP("bf16");
    } else {
        MMA_SP("f16");
    }
}

#endif

// Swizzling: pieces of 16 bytes change places within a row, so that the eight rows of a matrix are
// in different banks. A row of values has 4 pieces, so two rows cover all banks; a row of x has 8.
__device__ __forceinline__ int values_at(int row, int piece) {
    return row * (BLOCK_COLUMNS / 2) + (piece ^ (row >> 1 & 3)) * 8;
}

__device__ __forceinline__ int inputs_at(int row, int piece) {
    return row * BLOCK_COLUMNS + (piece ^ (row & 7)) * 8;
}

template <int block_tokens>
struct alignas(128) Stage {
    u16 values[BLOCK_ROWS * BLOCK_COLUMNS / 2];
    u16 inputs[block_tokens * BLOCK_COLUMNS];
    u32 metadata[2][BLOCK_ROWS];
};

template <bool bfloat, int block_tokens>
__device__ __forceinline__ void sparse_linear(const u16* values, const u32* metadata, const u16* x,
                                              const u16* bias, u16* y, Sums* partial, u32* arrivals,
                                              int rows, int columns, int tokens, int inputs,
                                              int outputs) {
    // A warp has row_tiles x token_tiles tiles of 16 rows and 8 tokens.
    constexpr int token_warps = block_tokens > 32 ? 2 : 1, row_warps = 4 / token_warps;
    constexpr int row_tiles = BLOCK_ROWS / row_warps / 16;
    constexpr int token_tiles = block_tokens / token_warps / 8;

    using Stage = mma::Stage<block_tokens>;
    Stage* stages = reinterpret_cast<Stage*>(shared_memory);

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Place at{int(blockIdx.y) * BLOCK_ROWS, int(blockIdx.x) * block_tokens};
    const int warp_row = warp % row_warps * row_tiles * 16;
    const int warp_token = warp / row_warps * token_tiles * 8;

    const int all_steps = columns / BLOCK_COLUMNS, splits = gridDim.z, split = blockIdx.z;
    const int first_step = i64(all_steps) * split / splits;
    const int steps = i64(all_steps) * (split + 1) / splits - first_step;

    auto fetch = [&](int step) {
        Stage& stage = stages[step % STAGES];
        const int column = (first_step + step) * BLOCK_COLUMNS;
        for (int part = thread; part < BLOCK_ROWS * 4; part += THREADS) {
            const int row = part / 4, piece = part % 4;
            const i64 from = i64(at.first_row + row) * (columns / 2) + column / 2 + piece * 8;
            copy_async(&stage.values[values_at(row, piece)], values + from, true);
        }
        for (int part = thread; part < block_tokens * 8; part += THREADS) {
            const int row = part / 8, piece = part % 8;
            const bool inside = at.first_token + row < tokens && column + piece * 8 < inputs;
            const i64 from = i64(at.first_token + row) * inputs + column + piece * 8;
            copy_async(&stage.inputs[inputs_at(row, piece)], x + (inside ? from : 0), inside);
        }
        if (thread < BLOCK_ROWS / 2) {
            const int half = thread / 32, word = thread % 32 * 4;
            const i64 from = i64(column / 32 + half) * rows + at.first_row + word;
            copy_async(&stage.metadata[half][word], metadata + from, true);
        }
    };

    float sums[row_tiles][token_tiles][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) fetch(step);
        commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        // After this barrier, all threads see this step's stage, and none reads the one before it.
        __syncthreads();
        if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
        commit_copies();
        const Stage& stage = stages[step % STAGES];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 a[row_tiles][4], words[row_tiles / 2], b[token_tiles][4];
#pragma unroll
            for (int i = 0; i < row_tiles; ++i) {
                const int row = warp_row + i * 16 + lane % 16;
                load_matrices(a[i], &stage.values[values_at(row, half * 2 + lane / 16)]);
            }
#pragma unroll
            for (int i = 0; i < row_tiles / 2; ++i)
                words[i] = stage.metadata[half][warp_row + i * 32 + lane];
#pragma unroll
            for (int j = 0; j < token_tiles; ++j) {
                const int token = warp_token + j * 8 + lane % 8;
                load_matrices(b[j], &stage.inputs[inputs_at(token, half * 4 + lane / 8)]);
            }
#pragma unroll
            for (int i = 0; i < row_tiles; i += 2)
#pragma unroll
                for (int j = 0; j < token_tiles; ++j) {
                    multiply<bfloat, 0>(sums[i][j], a[i], b[j], words[i / 2]);
                    multiply<bfloat, 1>(sums[i + 1][j], a[i + 1], b[j], words[i / 2]);
                }
        }
    }

    if (splits > 1) {
        const int tile = blockIdx.y * gridDim.x + blockIdx.x;
        const Shares shares{partial, arrivals, tile, split, splits};
        constexpr int count = row_tiles * token_tiles;
        float(&flat)[count][4] = reinterpret_cast<float(&)[count][4]>(sums);
        leave(shares.of(split, count, THREADS), THREADS, flat);
        if (!shares.arrive_last()) return;
        gather(flat, shares, THREADS);
    }

    // All copies have finished, so the stages' memory can be reused once all warps have multiplied.
    u16* staged = reinterpret_cast<u16*>(shared_memory);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
        float offset[2];
        load_bias<bfloat>(offset, bias, at.first_row + warp_row + i * 16, outputs, lane);
#pragma unroll
        for (int j = 0; j < token_tiles; ++j)
            stage_sums<bfloat>(staged, sums[i][j], warp_row + i * 16, warp_token + j * 8, offset,
                               lane);
    }
    __syncthreads();
    write_tile<block_tokens, THREADS>(staged, y, at, tokens, outputs, thread);
}

}  // namespace mma

#define KERNEL(NAME, BFLOAT, BLOCK_TOKENS)                                                       \
    extern "C" __global__ void __launch_bounds__(mma::THREADS, 2)                                \
        NAME(const u16* values, const u32* metadata, const u16* x, const u16* bias, u16* y,      \
             Sums* partial, u32* arrivals, int rows, int columns, int tokens, int inputs,   \
             int outputs) {                                                                      \
        mma::sparse_linear<BFLOAT, BLOCK_TOKENS>(values, metadata, x, bias, y, partial, arrivals, \
                                                 rows, columns, tokens, inputs, outputs);        \
    }

KERNEL(sparse_mma_8_float16, false, 8)
KERNEL(sparse_mma_16_float16, false, 16)
KERNEL(sparse_mma_32_float16, false, 32)
KERNEL(sparse_mma_64_float16, false, 64)
KERNEL(sparse_mma_8_bfloat16, true, 8)
KERNEL(sparse_mma_16_bfloat16, true, 16)
KERNEL(sparse_mma_32_bfloat16, true, 32)
KERNEL(sparse_mma_64_bfloat16, true, 64)
#undef KERNEL
