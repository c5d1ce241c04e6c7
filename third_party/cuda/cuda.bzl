"""Finds the CUDA toolkit, or says that there is none.

The toolkit is the first of: $CUDA_HOME, $CUDA_PATH, /usr/local/cuda, and the PyPI wheels that tools/install_deps
unpacks below $SYNCBN_DEPS (by default ~/.cache/syncbn). The repository exports one file, config.bzl, with the names
that third_party/cuda/defs.bzl builds upon. SYNCBN_CUDA=0 pretends that there is no toolkit.

To compile for another kind of machine than this one, $SYNCBN_CUDA_HOST_COMPILER names a compiler for it, and
$SYNCBN_CUDA_LIBRARIES the folder of CUDA's libraries for it. Without such a folder there is no toolkit for it, and the
toolkit is the one below $SYNCBN_DEPS, whose version these libraries have.
"""

def _candidates(ctx):
    environ = ctx.os.environ
    deps = environ.get("SYNCBN_DEPS", environ.get("HOME", "") + "/.cache/syncbn")
    if environ.get("SYNCBN_CUDA_HOST_COMPILER", ""):
        return [deps + "/cuda/nvidia/cu13"]
    return [path for path in [
        environ.get("CUDA_HOME", ""),
        environ.get("CUDA_PATH", ""),
        "/usr/local/cuda",
        deps + "/cuda/nvidia/cu13",
    ] if path]

def _cuda_toolkit_impl(ctx):
    root = ""
    host_compiler = ctx.os.environ.get("SYNCBN_CUDA_HOST_COMPILER", "")
    libraries = ctx.os.environ.get("SYNCBN_CUDA_LIBRARIES", "")
    complete = not host_compiler or ctx.path(libraries + "/libcudart_static.a").exists
    if complete and ctx.os.environ.get("SYNCBN_CUDA", "1") != "0":
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
        "CUDA_LIBRARIES = %r" % ([libraries] if host_compiler else [root + "/lib", root + "/lib64"]),
        "HOST_COMPILER = %r" % host_compiler,
        "",
    ]))

cuda_toolkit = repository_rule(
    implementation = _cuda_toolkit_impl,
    environ = [
        "CUDA_HOME",
        "CUDA_PATH",
        "HOME",
        "SYNCBN_CUDA",
        "SYNCBN_CUDA_HOST_COMPILER",
        "SYNCBN_CUDA_LIBRARIES",
        "SYNCBN_DEPS",
    ],
    local = True,
)
