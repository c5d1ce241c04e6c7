"""C++ from .proto files with Debian's protoc and gRPC plugin."""

# The option of protoc that names the plugin behind --grpc_out.
GRPC_PLUGIN = "--plugin=protoc-gen-grpc=/usr/bin/grpc_cpp_plugin"

def cc_proto_sources(name, srcs, outs_prefix, import_roots, grpc_srcs = [], imports = []):
    """Generates, as target NAME, the .pb.{h,cc} of every source and the .grpc.pb.{h,cc} of those with services.

    Args:
      name: the target to put among the srcs of a cc_library.
      srcs: .proto files of one package folder.
      outs_prefix: that folder as import names spell it, with a slash at its end.
      import_roots: folders, seen from the execution root, that import names start from.
      grpc_srcs: those of srcs that declare services.
      imports: labels of .proto files that srcs import.
    """
    outs = []
    for src in srcs:
        stem = outs_prefix + src.split(":")[-1].split("/")[-1][:-len(".proto")]
        outs += [stem + ".pb.h", stem + ".pb.cc"]
        if src in grpc_srcs:
            outs += [stem + ".grpc.pb.h", stem + ".grpc.pb.cc"]
    roots = " ".join(["--proto_path=" + root for root in import_roots + ["/usr/include"]])
    command = "protoc %s --cpp_out=$(RULEDIR) %s" % (
        roots,
        " ".join(["$(location %s)" % src for src in srcs]),
    )
    if grpc_srcs:
        command += " && protoc %s --grpc_out=$(RULEDIR) %s %s" % (
            roots,
            GRPC_PLUGIN,
            " ".join(["$(location %s)" % src for src in grpc_srcs]),
        )
    native.genrule(
        name = name,
        srcs = srcs + imports,
        outs = outs,
        cmd = command,
        message = "Generating C++ from the protos of",
    )
