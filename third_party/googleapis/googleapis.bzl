"""Finds the google.rpc protos (Status, ErrorInfo) where tools/install_deps unpacked them."""

def _googleapis_protos_impl(ctx):
    environ = ctx.os.environ
    root = environ.get("SYNCBN_DEPS", environ.get("HOME", "") + "/.cache/syncbn") + "/googleapis"
    for name in ["status", "error_details"]:
        source = "%s/google/rpc/%s.proto" % (root, name)
        if not ctx.path(source).exists:
            fail("%s is missing: run tools/install_deps first" % source)
        ctx.symlink(source, "google/rpc/%s.proto" % name)
    ctx.file("BUILD", """
exports_files(["google/rpc/error_details.proto", "google/rpc/status.proto"])

filegroup(
    name = "protos",
    srcs = ["google/rpc/error_details.proto", "google/rpc/status.proto"],
    visibility = ["//visibility:public"],
)
""")

googleapis_protos = repository_rule(
    implementation = _googleapis_protos_impl,
    environ = ["HOME", "SYNCBN_DEPS"],
    local = True,
)
