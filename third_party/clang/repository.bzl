"""Finds the clang-tidy that tools/tidy keeps below $SYNCBN_DEPS (by default ~/.cache/syncbn).

The repository exports one file, config.bzl. Its version is part of the path, so that another version checks everything
anew.
"""

def _clang_tidy_program_impl(ctx):
    environ = ctx.os.environ
    deps = environ.get("SYNCBN_DEPS", environ.get("HOME", "") + "/.cache/syncbn")
    version = ctx.read(ctx.attr.version).strip()
    ctx.file("BUILD", "")
    ctx.file("config.bzl", "CLANG_TIDY = %r\n" % (deps + "/venvs/clang-tidy-" + version + "/bin/clang-tidy"))

clang_tidy_program = repository_rule(
    implementation = _clang_tidy_program_impl,
    attrs = {"version": attr.label(default = "//third_party/clang:version")},
    environ = ["HOME", "SYNCBN_DEPS"],
    local = True,
)
