"""The Python API: the commands as functions, and as methods of a bundle.

    import thanos_deploy as td

    bundle = td.prune("model", pattern="2:4", out="out/model")
    bundle.export("onnx")

`thanos_deploy.__all__` lists the public names; everything else is internal. Functions are named
after the commands, and arguments after the options (`--block-size` is `block_size`), with the same
defaults. The errors are the same as well, so their messages spell options as on the command line.
Each function imports its dependencies when it is called.
"""
