"""Finds the CUDA toolkit, or says that there is none.

The toolkit is the first of: $CUDA_HOME, $CUDA_PATH, /usr/local/cuda, and the PyPI wheels that tools/install_deps
unpacks below $SYNCBN_DEPS (by default ~/.cache/syncbn). The repository exports one file, config.bzl, with the names
that third_party/cuda/defs.bzl builds upon. SYNCBN_CUDA=0 pretends that there is no toolkit.
"""

def _candidates(ctx):
    environ = ctx.os.environ
    deps = environ.get("SYNCBN_DEPS", environ.get("HOME", "") + "/.cache/syncbn")
    return [path for path in [
        environ.get("CUDA_HOME", ""),
        environ.get("CUDA_PATH", ""),
        "/usr/local/cuda",
        deps + "/cuda/nvidia/cu13",
    ] if path]

def _cuda_toolkit_impl(ctx):
    root = ""
    if ctx.os.environ.get("SYNCBN_CUDA", "1") != "0":
        for path in _candidates(ctx):
            if ctx.path(path + "/bin/nvcc").exists:
                root = path
                break
    version = ""
    if root:
        result = ctx.execute([root + "/bin/nvcc", "--version"])
        if result.return_code != 0:
            fail("%s/bin/nvcc does not run: %s" % (root, result.stderr))
        version = result.stdout.strip().split("\n")[-1]
    ctx.file("BUILD", "")
    ctx.file("config.bzl", "\n".join([
        "HAVE_CUDA = %r" % bool(root),
        "CUDA_ROOT = %r" % root,
        "CUDA_VERSION = %r" % version,
        "",
    ]))

cuda_toolkit = repository_rule(
    implementation = _cuda_toolkit_impl,
    environ = ["CUDA_HOME", "CUDA_PATH", "HOME", "SYNCBN_CUDA", "SYNCBN_DEPS"],
    local = True,
)
