"""Measure everything that needs a GPU, in one command and a few minutes.

    python -m benchmarks.gpu_campaign -o DIR [--only STEP,...] [--skip STEP,...] [--seconds N]
        [--bundle OUT] [--rehearse]

It runs from a source tree with nothing installed, on an image that has PyTorch, Triton,
transformers, numpy, safetensors, click and rich. Steps, in this order:

    card                the GPU, the driver and the versions; runs with every choice of steps
    peaks               the bandwidth of a copy, a product of 8192^3 in bf16
    correctness:KERNEL  every kernel for 2:4 against float64: 9 numbers of tokens, both dtypes,
                        sizes on and off the boundaries of tiles
    sanitizer           compute-sanitizer's memcheck and racecheck on small products
    gpu-tests:kernels   the tests of the kernels that need a GPU
    gemm:KERNEL         dense, cuSPARSELt with its first algorithm and searched, Triton, mma.sp: the
                        layers of the 8B and the 70B model, 5 numbers of tokens
    model:MODEL         an 8B-shaped model made on the GPU: dense, 2:4, structured, and both
    pruning             Thanos to 2:4, seconds a layer, beside the CPU; a Hessian of 262144 tokens
    walk:PRESET         Thanos to 2:4 as `prune` does it: a small model beside the CPU; and blocks
                        of the 8B model's sizes on 128 x 2048 tokens, with seconds and memory
    gpu-tests:pruning   the tests of pruning and shrinking that need a GPU
    onnxruntime         ONNX Runtime on CUDA with a tiny bundle; needs onnxruntime-gpu, and onnx and
                        onnxscript to make the bundle
    gpu-tests:engines   the tests of PyTorch's and ONNX Runtime's engines that need a GPU; needs
                        onnx, onnxscript and onnxruntime; only onnxruntime-gpu runs all of them

Each step runs in a process of its own with a limit of twice its usual time. If it fails or reaches
the limit, its rows are kept and the next step runs. A step that no longer fits into --seconds is
listed as left out. The files in DIR are

    rows.jsonl     every row, on disk before the next one is measured
    records.json   all rows as one document, see `thanos_deploy.gpu.records`
    summary.txt    the summary that is printed at the end
    log.txt        the output of the steps

--rehearse runs every step with toy sizes on a CPU: with Triton's interpreter in place of the GPU, a
simulation of the kernels in CUDA C++ behind a simulated driver (if g++ is installed), plain calls
in place of CUDA graphs, and a choice of kernels between the dense product and Triton. It shows that
nothing fails for a trivial reason. Its times mean nothing, and its records say so.

Ctrl-C or SIGTERM ends the running step; the four files are written with the rows so far.

Exit codes: 0 all passed, 2 usage, 4 nothing could run, 6 something failed, 130 interrupted.
"""
