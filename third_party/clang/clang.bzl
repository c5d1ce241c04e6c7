"""clang_tidy: an aspect that checks the C and C++ sources of the targets it is applied to.

    bazel build --aspects=//third_party/clang:clang.bzl%clang_tidy --output_groups=clang_tidy //...
    bazel build --aspects=//third_party/clang:clang.bzl%clang_tidy --output_groups=clang_checks //...

One action for each source has the checks of .clang-tidy and clang's own warnings, those of -Wthread-safety among them;
in the group clang_checks without the analyzer. It runs again when its source, a header that the source may include,
.clang-tidy or the version has changed.
"""

load("@clang_tidy//:config.bzl", "CLANG_TIDY")

_LANGUAGES = {
    "c": ["-std=gnu11"],
    "cc": ["-std=c++17"],
}

_WARNINGS = ["-Wall", "-Wextra", "-Wthread-safety"]

# The analyzer follows paths within functions, not through calls: a twelfth of the time.
_ANALYZER = ["-Xclang", "-analyzer-config", "-Xclang", "mode=shallow"]

# A parse needs no code for each instruction set.
_DEFINES = ["HWY_COMPILE_ONLY_STATIC"]

# The checks of each group, beyond those of .clang-tidy.
_GROUPS = {"clang_tidy": "", "clang_checks": "-clang-analyzer-*"}

# $1: the program, $2: the group's checks, $3: the source, $4: the report, then the compiler's flags.
_TIDY = '"$1" --quiet "--checks=$2" "$3" -- "${@:5}" >"$4" 2>&1 || { sed "s|$PWD/||g" "$4" >&2; exit 1; }'

def _check(ctx, group, source, headers, flags):
    report = ctx.actions.declare_file("%s.%s.%s" % (ctx.label.name, source.basename, group))
    ctx.actions.run_shell(
        outputs = [report],
        inputs = depset([source] + ctx.files._configs, transitive = [headers]),
        command = _TIDY,
        arguments = [CLANG_TIDY, _GROUPS[group], source.path, report.path] + _LANGUAGES[source.extension] + _WARNINGS +
                    flags,
        mnemonic = "ClangTidy",
        progress_message = "Checking %s" % source.short_path,
        use_default_shell_env = True,
    )
    return report

def _clang_tidy_impl(target, ctx):
    if CcInfo not in target or not hasattr(ctx.rule.attr, "srcs"):
        return []
    context = target[CcInfo].compilation_context
    flags = _ANALYZER + ["-D" + define for define in _DEFINES + context.defines.to_list() + context.local_defines.to_list()]
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
    return [OutputGroupInfo(**{
        group: depset([_check(ctx, group, file, context.headers, flags) for file in sources])
        for group in _GROUPS
    })]

clang_tidy = aspect(
    implementation = _clang_tidy_impl,
    attrs = {"_configs": attr.label(default = "//:clang_tidy_configs")},
)
