// One product by a kernel of simulated_gpu.hpp, in arrays that are exactly as large as it may touch.
//
// Usage: simulated_program KERNEL THREADS SHARED_BYTES BLOCK_TOKENS SPLITS ROWS COLUMNS TOKENS
//     INPUTS OUTPUTS 0|1 < values, metadata, x, bias > y

#include "simulated_gpu.hpp"

template <typename T>
static std::vector<T> read_array(std::size_t count) {
    std::vector<T> array(count);
    if (std::fread(array.data(), sizeof(T), count, stdin) != count) std::abort();
    return array;
}

int main(int, char** arguments) {
    const std::string name = arguments[1];
    int sizes[10];
    for (int i = 0; i < 10; ++i) sizes[i] = std::atoi(arguments[2 + i]);
    const auto [threads, shared_bytes, block_tokens, splits, rows, columns, tokens, inputs, outputs,
                has_bias] = sizes;
    const auto values = read_array<u16>(std::size_t(rows) * columns / 2);
    const auto metadata = read_array<u32>(std::size_t(rows) * columns / 32);
    const auto x = read_array<u16>(std::size_t(tokens) * inputs);
    const auto biases = read_array<u16>(has_bias ? outputs : 0);
    const u16* bias = has_bias ? biases.data() : nullptr;
    std::vector<u16> y(std::size_t(tokens) * outputs, 0xffff);  // NaN, should one be left out
    const int wide = (tokens + block_tokens - 1) / block_tokens, high = rows / BLOCK_ROWS;

    const int tiles = splits > 1 ? wide * high : 0;
    std::vector<Sums> partial(std::size_t(tiles) * splits * block_tokens * BLOCK_ROWS / 4,
                              {{NAN, NAN, NAN, NAN}});
    std::vector<u32> arrivals(tiles);

    if (const auto found = mma_kernels.find(name); found != mma_kernels.end()) {
        run({wide, high, splits}, threads, shared_bytes, [&] {
            found->second(values.data(), metadata.data(), x.data(), bias, y.data(), partial.data(),
                          arrivals.data(), rows, columns, tokens, inputs, outputs);
        });
    } else {
        const wgmma::TensorMap a{values.data(), rows, columns / 2, BLOCK_ROWS, BLOCK_COLUMNS / 2};
        const wgmma::TensorMap b{x.data(), tokens, inputs, block_tokens, BLOCK_COLUMNS};
        run({wide * high, 1, splits}, threads, shared_bytes + MORE_BYTES, [&] {
            wgmma_kernels.at(name)(a, b, metadata.data(), bias, y.data(), partial.data(),
                                   arrivals.data(), rows, columns, tokens, outputs);
        });
    }
    for (const u32 arrived : arrivals)
        if (arrived) std::abort();  // the next launch counts from 0
    std::fwrite(y.data(), sizeof(u16), y.size(), stdout);
}
