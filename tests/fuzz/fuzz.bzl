"""fuzzer: a program of libFuzzer's, and a test that gives its corpus to the same function without it."""

def fuzzer(name, deps = [], size = "small", changes = 10000):
    """Defines the fuzzer of NAME.cc, which has LLVMFuzzerTestOneInput.

    Defines the targets NAME (for --config=fuzz alone, which needs clang) and NAME_corpus_test, whose corpus is corpus/X
    for the fuzzer X_fuzzer. The test tries as many random changes of it as `changes` says.
    """
    corpus = "corpus/" + name[:-len("_fuzzer")]
    native.cc_binary(
        name = name,
        testonly = True,
        srcs = [name + ".cc"],
        linkopts = ["-fsanitize=fuzzer"],
        tags = ["manual"],
        deps = deps,
    )
    native.cc_test(
        name = name + "_corpus_test",
        size = size,
        srcs = [name + ".cc", "replay_main.cc"],
        args = [native.package_name() + "/" + corpus, "--random=%d" % changes, "--seed=1"],
        data = native.glob([corpus + "/*"]),
        deps = deps,
    )
