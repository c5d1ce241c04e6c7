"""cuda_library: C++ for host and device, by nvcc, as a cc_library.

nvcc compiles each source into an object for every architecture of ARCHITECTURES, and PTX of the newest for GPUs to come.
Where there is no toolkit (HAVE_CUDA is false), the library has the sources of `otherwise` in their place, so that
whatever depends on it still builds.
"""

load("@cuda//:config.bzl", "CUDA_LIBRARIES", "CUDA_ROOT", "HAVE_CUDA", "HOST_COMPILER")

# 75 Turing, 80 and 86 Ampere, 89 Ada, 90 Hopper, 100 and 120 Blackwell. CUDA 13 knows them all.
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]

# Flags that decide what the code computes, alike wherever it is compiled: tools/gpu_check reads these two lists.
# -fmad=false: a multiplication and an addition are fused only where the source says fma, as on the host, so that a CPU
# computes the same bits.
CODE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
]
HOST_COMPILER_FLAGS = [
    "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas,-ffp-contract=off",
]

# -Xptxas -v: the resources of each kernel, for a test to read. -compress-mode=size: the objects are a seventh as large
# as by default, 4 MB for all kernels, and take no longer to compile.
NVCC_FLAGS = CODE_FLAGS + [
    "-compress-mode=size",
    "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
] + HOST_COMPILER_FLAGS + [
    "-gencode=arch=compute_%s,code=sm_%s" % (arch, arch)
    for arch in ARCHITECTURES
] + [
    "-gencode=arch=compute_%s,code=compute_%s" % (ARCHITECTURES[-1], ARCHITECTURES[-1]),
]

def _cc_headers_impl(ctx):
    return [DefaultInfo(files = depset(transitive = [
        dep[CcInfo].compilation_context.headers
        for dep in ctx.attr.deps
    ]))]

# The headers of cc_libraries and of what they depend on, as files for a genrule.
cc_headers = rule(
    implementation = _cc_headers_impl,
    attrs = {"deps": attr.label_list(providers = [CcInfo])},
)

def _compiled_once_impl(ctx):
    return [DefaultInfo(files = depset(ctx.files.srcs), runfiles = ctx.runfiles(ctx.files.srcs))]

# Files made in the host's configuration. The flags of nvcc are the same in every configuration of Bazel, so an object
# serves them all; it would otherwise be compiled again, for minutes, for each sanitizer.
_compiled_in_one_configuration = rule(
    implementation = _compiled_once_impl,
    attrs = {"srcs": attr.label_list(cfg = "host", allow_files = True)},
)

# Objects for another kind of machine would take the place of those for this one.
_compiled_once = native.filegroup if HOST_COMPILER else _compiled_in_one_configuration

def cuda_library(name, srcs, headers, otherwise, deps = [], visibility = None, testonly = False):
    """A cc_library of CUDA sources.

    Args:
      name: of the library. <name>_resources is a file group of the compiler's reports, empty without CUDA.
      srcs: .cu files.
      headers: labels of what they include.
      otherwise: the .cc files of the library without CUDA.
      deps: cc_libraries that both kinds need.
      visibility: as ever.
      testonly: as ever.
    """
    if not HAVE_CUDA:
        native.cc_library(name = name, srcs = otherwise, deps = deps, visibility = visibility, testonly = testonly)
        native.filegroup(name = name + "_resources", srcs = [], visibility = visibility, testonly = testonly)
        return
    objects = []
    reports = []
    for src in srcs:
        stem = src[:-len(".cu")]
        native.genrule(
            name = "%s_%s_object" % (name, stem),
            srcs = [src] + headers,
            outs = [stem + ".cu.o", stem + ".resources.txt"],
            # Not by a wildcard, which would ask for it in the configuration of the target.
            tags = ["manual"],
            # A failure shows what the compiler said.
            cmd = ("{nvcc} {flags} -I. -c $(location {src}) -o $(location {stem}.cu.o)" +
                   " > $(location {stem}.resources.txt) 2>&1" +
                   " || (cat $(location {stem}.resources.txt) >&2; false)").format(
                nvcc = CUDA_ROOT + "/bin/nvcc",
                flags = " ".join(NVCC_FLAGS + (["-ccbin=" + HOST_COMPILER] if HOST_COMPILER else [])),
                src = src,
                stem = stem,
            ),
            message = "Compiling CUDA",
            testonly = testonly,
        )
        objects.append(stem + ".cu.o")
        reports.append(stem + ".resources.txt")
    _compiled_once(name = name + "_objects", srcs = objects, testonly = testonly)
    native.cc_library(
        name = name,
        srcs = [name + "_objects"],
        deps = deps,
        linkopts = ["-L" + folder for folder in CUDA_LIBRARIES] + [
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ],
        visibility = visibility,
        testonly = testonly,
    )
    _compiled_once(name = name + "_resources", srcs = reports, visibility = visibility, testonly = testonly)
