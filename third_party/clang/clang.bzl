"""clang_tidy: an aspect that checks the C and C++ sources of the targets it is applied to.

    bazel build --aspects=//third_party/clang:clang.bzl%clang_tidy --output_groups=clang_tidy //...
    bazel build --aspects=//third_party/clang:clang.bzl%clang_tidy --output_groups=clang_locks //...

One action parses each source once. The group clang_tidy has the checks of .clang-tidy and clang's own warnings, those
of -Wthread-safety among them. The group clang_locks has the warnings alone, and passes over sources that say nothing
about locks, nor a header of ours that they include. An action runs again when its source, a header that the source may
include, or .clang-tidy has changed.
"""

_LANGUAGES = {
    "c": ["-std=gnu11"],
    "cc": ["-std=c++17"],
}

_WARNINGS = ["-Wall", "-Wextra", "-Wthread-safety"]

# The analyzer follows paths within functions, not through calls: a twelfth of the time.
_ANALYZER = ["-Xclang", "-analyzer-config", "-Xclang", "mode=shallow"]

# A parse needs no code for each instruction set.
_DEFINES = ["HWY_COMPILE_ONLY_STATIC"]

# $1: the source, $2: the report, then the compiler's flags. clang-tidy runs with warnings and one check at least.
_TIDY = 'clang-tidy --quiet "$1" -- "${@:3}" >"$2" 2>&1 || { sed "s|$PWD/||g" "$2" >&2; exit 1; }'
_LOCKS = """
headers=($(sed -n 's/^#include "\\(.*\\)"$/\\1/p' "$1"))
grep -qsE 'ABSL_(PT_)?GUARDED_BY|ABSL_(EXCLUSIVE_|SHARED_)?LOCKS?_' "$1" "${headers[@]}" || { : >"$2"; exit 0; }
""" + _TIDY.replace("--quiet", "--quiet --checks='-*,clang-diagnostic-*,google-build-namespaces'")

def _check(ctx, group, source, command, headers, flags):
    report = ctx.actions.declare_file("%s.%s.%s" % (ctx.label.name, source.basename, group))
    ctx.actions.run_shell(
        outputs = [report],
        inputs = depset([source] + ctx.files._configs, transitive = [headers]),
        command = command,
        arguments = [source.path, report.path] + _LANGUAGES[source.extension] + _WARNINGS + flags,
        mnemonic = "ClangTidy",
        progress_message = "Checking %s" % source.short_path,
        use_default_shell_env = True,
    )
    return report

def _clang_tidy_impl(target, ctx):
    if CcInfo not in target or not hasattr(ctx.rule.attr, "srcs"):
        return []
    context = target[CcInfo].compilation_context
    flags = ["-D" + define for define in _DEFINES + context.defines.to_list() + context.local_defines.to_list()]
    for option, folders in [
        ("-I", context.includes),
        ("-iquote", context.quote_includes),
        ("-isystem", context.system_includes),
    ]:
        for folder in folders.to_list():
            flags += [option, folder]
    # Generated sources are not ours to improve.
    sources = [
        file
        for src in ctx.rule.attr.srcs
        for file in src.files.to_list()
        if file.is_source and file.extension in _LANGUAGES
    ]
    headers = context.headers
    return [OutputGroupInfo(
        clang_tidy = depset([_check(ctx, "clang_tidy", file, _TIDY, headers, _ANALYZER + flags) for file in sources]),
        clang_locks = depset([_check(ctx, "clang_locks", file, _LOCKS, headers, flags) for file in sources]),
    )]

clang_tidy = aspect(
    implementation = _clang_tidy_impl,
    attrs = {"_configs": attr.label(default = "//:clang_tidy_configs")},
)
