// kernels_check.cu on a GPU that the host plays.

#include "tests/gpu/kernels_check.cu"
