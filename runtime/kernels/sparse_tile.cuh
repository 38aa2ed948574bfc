#pragma once

// Shared by sparse_mma.cu and sparse_wgmma.cu: the layout of a 2:4 weight, and the writing of a
// finished tile of y to memory. It includes no header of a CUDA toolkit, so NVRTC needs none.
//
// mma.sp and wgmma take their sparse operand on the left, so the kernels compute y^T = W x^T.
//
//   values    16 bit [rows, columns / 2], the kept entries
//   metadata  32 bit [columns / 32, rows], in the order of torch.sparse for CUTLASS. Every 32 rows
//             and 32 columns have 32 words, one for each lane: lanes 4 g and 4 g + 1 hold columns
//             0-15 and 16-31 of rows g (low half) and g + 8 (high half), lanes 4 g + 2 and 4 g + 3
//             the same columns of rows g + 16 and g + 24. mma.sp reads the lanes that its selector
//             names, so one word in each lane serves two mma.sp.
//   x         16 bit [tokens, inputs]
//   bias      16 bit [outputs], or null
//   y         16 bit [tokens, outputs]
//
// rows is a multiple of 128 and columns of 64 (the host pads with zeros); outputs <= rows and
// inputs <= columns; inputs is a multiple of 8; all arrays are aligned to 16 bytes.
//
// Sources: PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction": fragments and
// metadata of .m16n8k32 for .f16 and .bf16. torch/sparse/_semi_structured_conversions.py: the order
// in which metadata are stored.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int BLOCK_ROWS = 128;
constexpr int BLOCK_COLUMNS = 64;

// 16 bytes, for one load or store.
struct alignas(16) Piece {
    u16 entries[8];
};

// Functions of the hardware. The simulation of the tests on a CPU defines its own versions of them.
#ifndef SIMULATED

alignas(1024) extern __shared__ unsigned char shared_memory[];

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

template <bool bfloat>
__device__ __forceinline__ float widen(u16 bits) {
    float value;
    if constexpr (bfloat) {
        value = __uint_as_float(static_cast<u32>(bits) << 16);
    } else {
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    }
    return value;
}

template <bool bfloat>
__device__ __forceinline__ u16 narrow(float value) {
    u16 bits;
    if constexpr (bfloat) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
    return bits;
}

#endif

// Length of a row of a finished tile in shared memory, which has the outputs of one token. The 8
// extra entries put the entries that the lanes of a warp write into different banks.
constexpr int STAGED_ROW = BLOCK_ROWS + 8;

// Four sums, for one load or store.
struct alignas(16) Sums {
    float of[4];
};

// Split-K: the workspace of the blocks that share a tile. Each block multiplies a range of the
// columns and writes its partial sums. The last block to arrive adds them up in the order of the
// columns, so the result is deterministic.
//
//   partial   [tiles, splits, sums of a tile], or null if there is one split
//   arrivals  [tiles], zeros before and after a launch
struct Shares {
    Sums* partial;
    u32* arrivals;
    int tile, split, splits;

    // This thread's sums of one split. The sums of its successive tiles of 16 x 8 lie `threads`
    // apart.
    __device__ __forceinline__ Sums* of(int which, int tiles_of_a_thread, int threads) const {
        return partial + (i64(tile) * splits + which) * tiles_of_a_thread * threads + threadIdx.x;
    }

    // Announce that the sums of this block are written; all threads call it. Return true in the
    // last block to arrive, which then sees the sums of all blocks.
    __device__ __forceinline__ bool arrive_last() const {
        __threadfence();
        __syncthreads();
        // atomicInc wraps around to 0, for the next launch.
        const bool last =
            threadIdx.x == 0 && atomicInc(&arrivals[tile], splits - 1) == u32(splits - 1);
        const bool all_there = __syncthreads_or(last);
        __threadfence();
        return all_there;
    }
};

template <int count>
__device__ __forceinline__ void leave(Sums* own, int threads, const float (&sums)[count][4]) {
#pragma unroll
    for (int i = 0; i < count; ++i)
        own[i * threads] = {{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}};
}

template <int count>
__device__ __forceinline__ void add(float (&sums)[count][4], const Sums* more, int threads) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const Sums part = more[i * threads];
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[i][r] += part.of[r];
    }
}

// Add up the partial sums of all splits, from zero, in the order of the columns.
template <int count>
__device__ __forceinline__ void gather(float (&sums)[count][4], const Shares& shares, int threads) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
    // The loop is unrolled as far as registers allow, so that several loads are in flight at once
    // and their L2 latency overlaps.
    constexpr int ahead = count <= 8 ? 4 : 1;
#pragma unroll ahead
    for (int which = 0; which < shares.splits; ++which)
        add(sums, shares.of(which, count, threads), threads);
}

// Position of a tile of y.
struct Place {
    int first_row, first_token;
};

// Add the bias to the sums of 16 rows and 8 tokens, round them, and put them into the staged tile.
// Register r of a lane holds row lane / 4 + 8 (r / 2) and token 2 (lane % 4) + r % 2.
template <bool bfloat>
__device__ __forceinline__ void stage_sums(u16* staged, const float (&sums)[4], int row, int token,
                                           const float (&bias)[2], int lane) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
        staged[(token + lane % 4 * 2 + r % 2) * STAGED_ROW + row + lane / 4 + r / 2 * 8] =
            narrow<bfloat>(sums[r] + bias[r / 2]);
}

// Load the bias of the two rows that a lane holds of the 16 rows from `row` on.
template <bool bfloat>
__device__ __forceinline__ void load_bias(float (&to)[2], const u16* bias, int row, int outputs,
                                          int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int output = row + lane / 4 + half * 8;
        to[half] = bias && output < outputs ? widen<bfloat>(bias[output]) : 0.f;
    }
}

// Write a staged tile to y, 16 bytes at once where the rows of y are aligned to 16 bytes.
template <int block_tokens, int threads>
__device__ __forceinline__ void write_tile(const u16* staged, u16* y, Place at, int tokens,
                                           int outputs, int thread) {
    constexpr int pieces = BLOCK_ROWS / 8;
    for (int part = thread; part < block_tokens * pieces; part += threads) {
        const int token = at.first_token + part / pieces, output = at.first_row + part % pieces * 8;
        if (token >= tokens || output >= outputs) continue;
        const u16* from = &staged[part / pieces * STAGED_ROW + part % pieces * 8];
        u16* to = &y[i64(token) * outputs + output];
        if (outputs % 8 == 0)
            *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
        else
            for (int e = 0; e < 8 && output + e < outputs; ++e) to[e] = from[e];
    }
}
