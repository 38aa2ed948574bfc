// y = x W^T + b with W 2:4, on sparse tensor cores: mma.sp of 16 x 8 x 32 from compute capability 8.0
// on, wgmma.mma_async.sp of 64 x 64 x 32 when compiled for sm_90a.
//
// Both take their sparse operand on the left, so what is computed is y^T = W x^T: a block makes
// 128 rows of W times 64 tokens, in steps of 64 columns, of which three are on their way at a time
// (cp.async). With mma.sp each of the four warps makes 64 rows and 32 tokens; with wgmma they make 64
// rows together, twice, each warp 16 of them for all tokens.
//
//   values    16 bit [rows, columns / 2], the kept entries
//   metadata  32 bit [columns / 32, rows], as torch.sparse has it for CUTLASS: of every 32 rows and
//             32 columns 32 words, one a lane; lanes 4 g and 4 g + 1 hold columns 0-15 and 16-31 of
//             rows g (low half) and g + 8 (high half), lanes 4 g + 2 and 4 g + 3 those of rows
//             g + 16 and g + 24. That is what mma.sp takes from the lanes that its selector names,
//             so that one word a lane serves two of them.
//   x         16 bit [tokens, columns]
//   bias      16 bit [outputs], or null
//   y         16 bit [tokens, outputs]
//
// rows are a multiple of 128 and columns of 64 (the host pads with zeros); outputs <= rows; values
// and x are aligned to 16 bytes.
//
// Sources: PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction": fragments and
// metadata of .m16n8k32 for .f16 and .bf16; "Asynchronous Warpgroup Level Matrix Instructions":
// fragments and matrix descriptors of wgmma. CUTLASS, mma_traits_sm90_gmma_sparse.hpp, ELayout_64x32:
// its metadata. torch/sparse/_semi_structured_conversions.py: the order in which they are stored.
// There are no includes, so NVRTC needs no toolkit.

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

constexpr int BLOCK_ROWS = 128;
constexpr int BLOCK_TOKENS = 64;
constexpr int BLOCK_COLUMNS = 64;
constexpr int STAGES = 3;
constexpr int THREADS = 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUP
#endif

// Tiles of 16 rows and 8 tokens of a warp.
#ifdef WARPGROUP
constexpr int ROW_TILES = 2, TOKEN_TILES = 8;
#else
constexpr int ROW_TILES = 4, TOKEN_TILES = 4;
#endif

// What the hardware does. A test on the CPU gives these functions by itself.
#ifndef SIMULATED

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, in the background; zeros where `inside` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Wait until at most `left` of the committed groups of copies are on their way.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 x 8 matrices; lane 8 i + r points at row r of matrix i.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#ifdef WARPGROUP

// Copies to shared memory become visible to wgmma.
__device__ __forceinline__ void publish_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 64 rows of 128 bytes, eight in 1024, of which pieces of 16 bytes change places as in `inputs_at`.
using Matrix = unsigned long long;

__device__ __forceinline__ Matrix describe(const u16* first) {
    constexpr Matrix swizzle_128_bytes = Matrix(1) << 62, eight_rows = Matrix(1024 / 16) << 32;
    return swizzle_128_bytes | eight_rows | Matrix(1) << 16 | (shared_address(first) & 0x3ffff) >> 4;
}

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void finish_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define SUMS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define WGMMA_SP(TYPE)                                                                         \
    asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0;"                                     \
                 "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32." TYPE "." TYPE                \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"     \
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30," \
                 " %31}, {%32, %33, %34, %35}, %36, %37, 0, add, 1, 1, 0;}"                    \
                 : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7)      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata))

// sums += a b for all four warps' rows; `metadata` of lanes 4 g and 4 g + 1 says where a's are.
template <bool bfloat>
__device__ __forceinline__ void multiply(float (&sums)[8][4], const u32 (&a)[4], Matrix b,
                                         u32 metadata) {
    if constexpr (bfloat) {
        WGMMA_SP("bf16");
    } else {
        WGMMA_SP("f16");
    }
}

#else

#define MMA_SP(TYPE)                                                                            \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE    \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                \
                 "{%0, %1, %2, %3}, %12, %13;"                                                  \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), \
                   "r"(b[3]), "r"(metadata), "n"(selector))

// sums += a b, where a is 2:4 and `metadata` of lanes 4 g + 2 selector and the next says where.
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

// Pieces of 16 bytes change places within a row, so that the eight rows of a matrix are in
// different banks: a row of values has 4 pieces and two rows make up all banks, a row of x has 8.
__device__ __forceinline__ int values_at(int row, int piece) {
    return row * (BLOCK_COLUMNS / 2) + (piece ^ (row >> 1 & 3)) * 8;
}

__device__ __forceinline__ int inputs_at(int row, int piece) {
    return row * BLOCK_COLUMNS + (piece ^ (row & 7)) * 8;
}

// Aligned as wgmma's swizzling of x asks for.
struct alignas(1024) Stage {
    u16 values[BLOCK_ROWS * BLOCK_COLUMNS / 2];
    u16 inputs[BLOCK_TOKENS * BLOCK_COLUMNS];
};

template <bool bfloat>
__device__ __forceinline__ void sparse_linear(const u16* values, const u32* metadata, const u16* x,
                                              const u16* bias, u16* y, int rows, int columns,
                                              int tokens, int outputs) {
    __shared__ Stage stages[STAGES];

    const int thread = threadIdx.x;
    const int lane = thread % 32;
    const int warp = thread / 32;
    const int first_token = blockIdx.x * BLOCK_TOKENS;
    const int first_row = blockIdx.y * BLOCK_ROWS;
#ifdef WARPGROUP
    const int warp_row = warp * 16, next_row = 64, warp_token = 0;
    // The selector is the same for all warps, so a warp takes the two lanes' words that it needs.
    const int word_at = warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2 + lane % 2, next_word = 64;
#else
    const int warp_row = warp % 2 * 64, next_row = 16, warp_token = warp / 2 * 32;
    const int word_at = warp_row + lane, next_word = 32;
#endif
    const int steps = columns / BLOCK_COLUMNS;

    auto fetch = [&](int step) {
        Stage& stage = stages[step % STAGES];
        for (int part = thread; part < BLOCK_ROWS * 4; part += THREADS) {
            const int row = part / 4, piece = part % 4;
            const i64 from = i64(first_row + row) * (columns / 2) + step * (BLOCK_COLUMNS / 2);
            copy_async(&stage.values[values_at(row, piece)], values + from + piece * 8, true);
        }
        for (int part = thread; part < BLOCK_TOKENS * 8; part += THREADS) {
            const int row = part / 8, piece = part % 8;
            const bool inside = first_token + row < tokens;
            const i64 from = i64(inside ? first_token + row : 0) * columns + step * BLOCK_COLUMNS;
            copy_async(&stage.inputs[inputs_at(row, piece)], x + from + piece * 8, inside);
        }
    };
    // Of two times 32 columns, two words, enough for all rows of the warp.
    u32 words[2][2];
    auto fetch_metadata = [&](int step) {
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < 2; ++i)
                words[half][i] = metadata[i64(step * 2 + half) * rows + first_row + word_at +
                                          i * next_word];
    };

    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) fetch(step);
        commit_copies();
    }
    fetch_metadata(0);
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
#ifdef WARPGROUP
        publish_copies();
#endif
        // After this, step's stage is there for all, and the one before it is read by none.
        __syncthreads();
        if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
        commit_copies();
        u32 now[2][2] = {{words[0][0], words[0][1]}, {words[1][0], words[1][1]}};
        if (step + 1 < steps) fetch_metadata(step + 1);
        const Stage& stage = stages[step % STAGES];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 a[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) {
                const int row = warp_row + i * next_row + lane % 16;
                load_matrices(a[i], &stage.values[values_at(row, half * 2 + lane / 16)]);
            }
#ifdef WARPGROUP
            const Matrix b = describe(&stage.inputs[half * 32]);
            begin_products();
            multiply<bfloat>(sums[0], a[0], b, now[half][0]);
            multiply<bfloat>(sums[1], a[1], b, now[half][1]);
            finish_products();
#else
            u32 b[TOKEN_TILES][4];
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; ++j) {
                const int token = warp_token + j * 8 + lane % 8;
                load_matrices(b[j], &stage.inputs[inputs_at(token, half * 4 + lane / 8)]);
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; i += 2)
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; ++j) {
                    multiply<bfloat, 0>(sums[i][j], a[i], b[j], now[half][i / 2]);
                    multiply<bfloat, 1>(sums[i + 1][j], a[i + 1], b[j], now[half][i / 2]);
                }
#endif
        }
    }

    // Register r of a lane: row lane / 4 + 8 (r / 2), token 2 (lane % 4) + r % 2.
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int output = first_row + warp_row + i * next_row + lane / 4 + r / 2 * 8;
                const int token = first_token + warp_token + j * 8 + lane % 4 * 2 + r % 2;
                if (output < outputs && token < tokens)
                    y[i64(token) * outputs + output] =
                        narrow<bfloat>(sums[i][j][r] + (bias ? widen<bfloat>(bias[output]) : 0.f));
            }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sparse_linear_float16(const u16* values, const u32* metadata, const u16* x, const u16* bias,
                          u16* y, int rows, int columns, int tokens, int outputs) {
    sparse_linear<false>(values, metadata, x, bias, y, rows, columns, tokens, outputs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sparse_linear_bfloat16(const u16* values, const u32* metadata, const u16* x, const u16* bias,
                           u16* y, int rows, int columns, int tokens, int outputs) {
    sparse_linear<true>(values, metadata, x, bias, y, rows, columns, tokens, outputs);
}
