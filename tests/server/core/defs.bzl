"""The rule for tests of the round engine."""

def engine_test(name, extra_deps = [], **kwargs):
    """A test that drives a coordinator on a virtual clock; without gRPC, so it runs under tsan too."""
    native.cc_test(
        name = name,
        size = "small",
        srcs = [name + ".cc"],
        tags = ["tsan"],
        deps = [
            "//server/core:coordinator",
            "//server/core:error",
            "//tests/testing:engine",
            "//tests/testing:moments_oracle",
            "//third_party:absl",
            "//third_party:gtest_main",
        ] + extra_deps,
        **kwargs
    )
