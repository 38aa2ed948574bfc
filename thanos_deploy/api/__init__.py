"""The Python API: what the commands do, as functions and as methods of a bundle.

    import thanos_deploy as td

    bundle = td.prune("model", pattern="2:4", out="out/model")
    bundle.export("onnx")

`thanos_deploy.__all__` lists what is promised; everything else is internal. The names are those of
the commands, arguments are called as the options are (`--block-size` is `block_size`) and have the
same defaults, and the errors are the same: their messages spell options as the command line does.
Each function imports what it needs when it is called.
"""
