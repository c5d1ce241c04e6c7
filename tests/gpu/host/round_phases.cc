// round_phases.cu on a GPU that the host plays.

#include "tests/gpu/round_phases.cu"
