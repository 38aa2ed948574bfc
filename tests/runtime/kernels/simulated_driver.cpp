// What cuda_module.py calls of the CUDA driver, for the kernels of simulated_gpu.hpp and memory of the
// host. The signatures are those of cuda.h.

#include <cstdint>

#include "simulated_gpu.hpp"

static constexpr int SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500;

struct Function {
    // Calls the kernel of one thread; each of the pointers is to one of its arguments.
    std::function<void(void**)> call;
    std::size_t more_bytes;
};

template <typename... Arguments, std::size_t... i>
static std::function<void(void**)> caller(void (*kernel)(Arguments...), std::index_sequence<i...>) {
    return [=](void** given) { kernel(*static_cast<std::decay_t<Arguments>*>(given[i])...); };
}

template <typename... Arguments>
static Function function(void (*kernel)(Arguments...), std::size_t more_bytes) {
    return {caller(kernel, std::index_sequence_for<Arguments...>()), more_bytes};
}

static std::map<std::string, Function> every_function() {
    std::map<std::string, Function> found;
    for (const auto& [name, kernel] : mma_kernels) found[name] = function(kernel, 0);
    for (const auto& [name, kernel] : wgmma_kernels) found[name] = function(kernel, MORE_BYTES);
    return found;
}

extern "C" {

int cuGetErrorString(int, const char** text) {
    *text = "refused by the simulated driver";
    return SUCCESS;
}

int cuModuleGetFunction(const Function** to, void*, const char* name) {
    static const auto functions = every_function();
    const auto found = functions.find(name);
    if (found == functions.end()) return NOT_FOUND;
    *to = &found->second;
    return SUCCESS;
}

int cuFuncSetAttribute(const Function*, int, int) { return SUCCESS; }

int cuTensorMapEncodeTiled(wgmma::TensorMap* map, int, std::uint32_t rank, void* first,
                           const std::uint64_t* sizes, const std::uint64_t* row_bytes,
                           const std::uint32_t* box, const std::uint32_t* steps, int, int swizzle,
                           int, int) {
    const int wanted = box[0] * 2 == 64 ? 2 : 3;  // of 64 or 128 bytes
    if (rank != 2 || row_bytes[0] != sizes[0] * 2 || steps[0] != 1 || steps[1] != 1 ||
        swizzle != wanted || std::bit_cast<std::size_t>(first) % 16 || row_bytes[0] % 16)
        return INVALID_VALUE;
    *map = {static_cast<const unsigned short*>(first), int(sizes[1]), int(sizes[0]), int(box[1]),
            int(box[0])};
    return SUCCESS;
}

int cuLaunchKernel(const Function* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned, unsigned, unsigned shared_bytes, void*, void** arguments, void**) {
    run({int(x), int(y), int(z)}, threads, shared_bytes + function->more_bytes,
        [=] { function->call(arguments); });
    return SUCCESS;
}

}  // extern "C"
